"""The examples in docstrings do what they say, run in a folder that has the shipped models in it."""

import doctest
import importlib
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("x2v_jax", "train", "convert", "infer", "benchmarks")


def modules_with_examples() -> list[str]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if ">>> " in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", modules_with_examples())
def test_the_examples_of_a_module_do_what_they_say(
    path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(path.removesuffix(".py").replace("/", ".")))
    assert results.attempted
    assert not results.failed, capsys.readouterr().out


def test_an_example_that_does_not_do_what_it_says_fails():
    module = types.ModuleType("wrong", "How to count.\n\n>>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1


def test_no_example_is_skipped():
    for path in modules_with_examples():
        assert "doctest: +SKIP" not in (ROOT / path).read_text(), path
