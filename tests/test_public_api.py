"""What `x2v_jax` promises: names that are there, typed keywords, no jax before it is needed, and no side effects."""

import ast
import dataclasses
import inspect
import pathlib
import subprocess
import sys
import types
import typing

import pytest

import x2v_jax
from x2v_jax.pipeline import Pipeline
from x2v_jax.request.options import OptionFields, RunOptions
from x2v_jax.request.request import Request, RequestFields

LIBRARY = pathlib.Path(x2v_jax.__file__).parent


def in_a_fresh_process(code: str) -> str:
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_public_name_is_there_and_listed():
    for name in x2v_jax.__all__:
        assert getattr(x2v_jax, name) is not None and name in dir(x2v_jax)
    assert set(x2v_jax._HOMES) | {"UserError", "__version__"} == set(x2v_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        x2v_jax.Pipelin  # noqa: B018


@pytest.mark.parametrize(
    "line",
    [
        "from x2v_jax.request import Request",
        "from x2v_jax import Request, UserError, read_metadata, write_video",
        "import x2v_jax; dir(x2v_jax)",
    ],
)
def test_requests_and_files_come_without_jax_and_without_a_warning(line: str):
    in_a_fresh_process(f"{line}\nimport sys; assert 'jax' not in sys.modules, 'jax was imported'")


def test_the_old_place_of_videos_works_and_names_the_new_one():
    sys.modules.pop("x2v_jax.video", None)
    with pytest.warns(DeprecationWarning, match="x2v_jax.media.video"):
        from x2v_jax.video import write_video
    assert write_video is x2v_jax.write_video


def test_the_package_says_that_it_is_typed():
    assert (LIBRARY / "py.typed").is_file()


@pytest.mark.parametrize(
    ("fields", "of", "without"), [(RequestFields, Request, {"prompt"}), (OptionFields, RunOptions, set())]
)
def test_keywords_are_the_fields_with_their_types(fields: type, of: type, without: set[str]):
    expected = {field.name: field.type for field in dataclasses.fields(of) if field.name not in without}
    if of is Request:
        assert typing.get_type_hints(fields) == expected
    assert set(fields.__annotations__) == set(expected)


@pytest.mark.parametrize(
    ("function", "of"),
    [
        (Pipeline.__call__, Request), (Pipeline.stream, Request),
        (Pipeline.from_checkpoint, RunOptions), (Pipeline.__init__, RunOptions),
    ],
)  # fmt: skip
def test_help_shows_each_keyword_with_its_default(function: types.FunctionType, of: type):
    shown = inspect.signature(function).parameters
    for field in dataclasses.fields(of):
        if field.name != "prompt":
            assert shown[field.name].default == field.default
            assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())


def calls_of(path: pathlib.Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.append((node.lineno, ast.unparse(node.func)))
    return found


def test_the_library_never_prints_exits_or_sets_signals_and_filters():
    forbidden = {
        "print", "input", "exit", "quit", "sys.exit", "os._exit", "signal.signal", "sys.stdout.write",
        "sys.stderr.write", "logging.basicConfig",
    }  # fmt: skip
    programs = {"cli", "__main__.py"}  # the command lines, as a wheel has them
    for path in LIBRARY.rglob("*.py"):
        if path.relative_to(LIBRARY).parts[0] in programs:
            continue
        bad = [(line, name) for line, name in calls_of(path) if name in forbidden]
        assert not bad, f"{path}: {bad}; a library logs, raises and returns"
        if {"warnings.simplefilter", "warnings.filterwarnings"} & {name for _, name in calls_of(path)}:
            source = path.read_text()
            assert "warnings.catch_warnings()" in source, f"{path} changes the warnings of the whole program"


def test_the_library_logs_what_it_does():
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "from x2v_jax.generate.clock import Clock\n"
        "clock = Clock()\nwith clock('load'): pass"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DEBUG:x2v_jax.generate.clock:load: " in run.stderr
