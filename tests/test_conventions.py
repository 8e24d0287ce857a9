"""Entry points are short, no security check is an assert, and help and errors come without jax."""

import ast
import pathlib
import re
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


def texts(source: str) -> list[tuple[int, str]]:
    """Lines and values of the strings of a module, f-strings with {} for what they fill in; no docstrings."""
    tree, found = ast.parse(source), []
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        if has_docstring and isinstance(first := node.body[0], ast.Expr):
            parts.add(id(first.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            values = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append((node.lineno, "".join(str(value) for value in values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append((node.lineno, node.value))
    return found


def named_programs(source: str) -> list[int]:
    pattern = re.compile(r"\bpython3?\s+-m\s+(infer|convert|train)\b|(^|[\s`'\"])x2v\s+(infer|convert|train|prepare)\b")
    return [line for line, text in texts(source) if pattern.search(text)]


def test_what_users_are_shown_names_programs_through_one_helper():
    for package in ("x2v_jax", "infer", "convert", "train", "configs", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            lines = named_programs(path.read_text())
            assert not lines, f"{path.relative_to(ROOT)} line {lines[0]}: write x2v_jax.shipped.command(…) instead"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""`python -m infer` in a docstring."""', False),
        ('raise UserError(f"{path}: run `python -m convert wan {path}`")', True),
        ('f"run `python -m "\\\n"train.prepare`"', True),
        ('help = "as in `x2v infer`"', True),
        ("f\"run `{shipped.command('convert wan')}`\"", False),
    ],
)
def test_a_program_that_is_named_elsewhere_is_seen(source: str, found: bool):
    assert bool(named_programs(source)) == found
