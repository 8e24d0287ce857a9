"""`x2v` in a clone: its commands, and that one file is never loaded under two names."""

import pathlib
import subprocess
import sys

import pytest

from tools.check_wheel import decoys
from x2v_jax import cli, shipped
from x2v_jax.cli import PROGRAMS

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Runs a program and prints the files that more than one module of the process came from.
TWICE = """
import collections, os, runpy, sys
sys.path.insert(0, {root!r})
try:
    {start}
except SystemExit as end:
    assert not end.code, end.code
names = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith({root!r} + os.sep):
        names[os.path.realpath(file)].append(name)
assert any(os.sep + {package!r} + os.sep in file for file in names), sorted(names)
print({{file: found for file, found in names.items() if len(found) > 1}})
"""


def test_alone_it_shows_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("infer", "convert", "train", "prepare", "completion"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"x2v {shipped.VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyz"], "unknown command 'xyz'; known: infer, convert, train, prepare"),
        (["completion"], "completion: no shell is given; write `x2v completion bash` or `x2v completion zsh`"),
        (["completion", "fish"], "completion: fish is given; write `x2v completion bash` or `x2v completion zsh`"),
        (["convert"], "the following arguments are required: COMMAND; `python -m convert --help` lists what there is"),
        (["infer", "--size=3"], "unknown option --size; write --config.height=… --config.width=…"),
        (["train", "--nothing"], "unknown option --nothing"),
        (["prepare", "check", "nowhere"], "nowhere does not exist; make one with `python -m train.prepare`"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}") and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "package"),
    [
        ("import x2v_jax.cli; sys.exit(x2v_jax.cli.main(['train', '--dry_run', {config!r}]))", "train"),
        ("sys.argv[1:] = ['--dry_run', {config!r}]; runpy.run_module('train', run_name='__main__')", "train"),
        ("import x2v_jax.cli; sys.exit(x2v_jax.cli.main(['convert', 'inspect', 'assets/shapes']))", "convert"),
        ("import infer.cli, x2v_jax.cli; sys.exit(x2v_jax.cli.main(['infer', '--help']))", "infer"),
    ],
)
def test_no_file_is_loaded_under_two_names(start: str, package: str, tmp_path: pathlib.Path):
    decoys(tmp_path)
    start = start.format(config="--config=configs/train/shapes_t2v_dmd.py")
    script = TWICE.format(root=str(ROOT), start=start, package=package)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "{}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_users_own_folders_disturb_no_program(name: str, tmp_path: pathlib.Path):
    decoys(tmp_path)
    command = [sys.executable, "-m", "x2v_jax", name, "--help"]
    # The user's folder comes first on the path, as with `python -m` or PYTHONPATH=.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"python -m x2v_jax {name}" in result.stdout
