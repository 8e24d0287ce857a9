"""Where shipped files are found from, and how a sentence names the program."""

import pathlib
import subprocess
import sys

import pytest

from x2v_jax import shipped
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError

MODEL = "assets/shapes_t2v_4step"


def test_a_shipped_model_is_found_from_every_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(MODEL).has("vae")
    assert shipped.locate(MODEL) == shipped.locate(MODEL, typed=False) == str(shipped.ROOT / MODEL)
    assert shipped.recorded(shipped.locate(MODEL)) == MODEL
    for other in ("assets/none", "assets/../setup.py", "x2v_jax", str(tmp_path), ""):
        assert shipped.locate(other) == shipped.recorded(other) == other


def test_the_working_directory_comes_first_for_what_is_typed_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir(parents=True)
    assert shipped.locate(MODEL) == MODEL
    assert shipped.locate(MODEL, typed=False) == str(shipped.ROOT / MODEL)
    monkeypatch.chdir(shipped.ROOT)  # where both are the same, a record and a sentence say it as it was given
    assert shipped.locate(MODEL, typed=False) == MODEL


def test_a_file_that_a_wheel_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    file = shipped.ROOT / "assets/shapes/transformer.safetensors"
    assert shipped.missing(file) is None  # in a clone a missing file is damage
    monkeypatch.setattr(shipped, "IS_INSTALLED", True)
    assert "give the path of that clone's assets/shapes" in (shipped.missing(file) or "")
    assert shipped.missing(tmp_path / "transformer.safetensors") is None


@pytest.mark.parametrize(
    ("started", "installed", "shown"),
    [
        ("/venv/bin/x2v", False, "x2v prepare check PATH"),
        ("C:/venv/Scripts/x2v.exe", True, "x2v prepare check PATH"),
        ("/clone/infer/__main__.py", False, "python -m train.prepare check PATH"),
        ("/clone/x2v_jax/__main__.py", False, "python -m x2v_jax prepare check PATH"),
        ("my_program.py", False, "python -m train.prepare check PATH"),
        ("my_program.py", True, "x2v prepare check PATH"),
        ("", True, "x2v prepare check PATH"),
    ],
)
def test_a_command_is_named_as_the_program_was_started(
    started: str, installed: bool, shown: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shipped, "IS_INSTALLED", installed)
    assert shipped.command("prepare check PATH") == shown


def test_a_command_of_x2v_alone_is_x2vs():
    assert shipped.command("completion bash") == "x2v completion bash"
    assert shipped.command("convert") == "python -m convert"


def test_another_package_of_the_same_name_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"name = {folder!r}")
    monkeypatch.delitem(sys.modules, "x2v_test_package", raising=False)
    first = shipped.load_package("x2v_test_package", tmp_path / "a")
    assert first.name == "a" and shipped.load_package("x2v_test_package", tmp_path / "a") is first
    with pytest.raises(UserError, match="has imported another 'x2v_test_package' already"):
        shipped.load_package("x2v_test_package", tmp_path / "b")
    monkeypatch.delitem(sys.modules, "x2v_test_package")


def test_nothing_of_it_imports_jax():
    code = "import sys, x2v_jax.shipped, x2v_jax.cli; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=shipped.ROOT)
