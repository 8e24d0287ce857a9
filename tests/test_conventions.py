"""Entry points are short, no security check is an assert, and help and errors come without jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("package", ["infer", "convert", "train"])
def test_entry_points_only_parse_call_and_report(package: str):
    assert len((ROOT / package / "__main__.py").read_text().splitlines()) <= 60


def test_security_checks_are_not_asserts():
    for path in (ROOT / "x2v_jax/checkpoint").rglob("*.py"):
        asserts = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path} line {asserts[0].lineno}: python -O would remove this assert"


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "infer", "--help"),
        ("-m", "infer", "--config.prmpt=x"),
        ("-m", "convert", "--help"),
        ("-m", "convert", "inspect", "/no/such/folder"),
        ("-m", "train", "--help"),
        ("-m", "train", "--config.sed=1"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_jax(arguments: tuple[str, ...]):
    spy = "import sys, runpy; sys.argv = sys.argv[1:]\ntry:\n runpy.run_module(sys.argv.pop(0), run_name='__main__')\n"
    spy += "finally:\n assert 'jax' not in sys.modules, 'jax was imported'\n"
    module, *rest = arguments[1:]
    result = subprocess.run(
        [sys.executable, "-c", spy, module, module, *rest], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode in (0, 2), result.stderr
    assert "jax was imported" not in result.stderr
    assert "Traceback" not in result.stderr
