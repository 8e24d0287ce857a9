"""The shape of the code base: imports point one way, entry points are short, errors come without jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What a package may not import.
FORBIDDEN = {
    "x2v_jax/ops": ("x2v_jax.models", "x2v_jax.diffusion", "x2v_jax.checkpoint", "x2v_jax.pipeline", "infer", "train"),
    "x2v_jax/models": ("x2v_jax.diffusion", "x2v_jax.checkpoint", "x2v_jax.pipeline", "infer", "train"),
    "x2v_jax/diffusion": ("x2v_jax.checkpoint", "x2v_jax.pipeline", "infer", "train"),
    "x2v_jax/checkpoint": ("x2v_jax.ops", "x2v_jax.diffusion", "x2v_jax.pipeline", "infer", "train"),
    "x2v_jax": ("infer", "train", "convert", "configs", "benchmarks"),
    "configs": ("infer", "train", "convert"),
}


def imported(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str):
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            for forbidden in FORBIDDEN[package]:
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path} imports {name}"


def test_checkpoint_knows_no_networks_but_their_configs():
    for path in (ROOT / "x2v_jax/checkpoint").rglob("*.py"):
        used = {name for name in imported(path) if name.startswith("x2v_jax.models")}
        assert used <= {"x2v_jax.models.config"}, f"{path} imports {used}"


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
