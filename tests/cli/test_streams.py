"""What becomes of standard output is never a traceback."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
_LONG = "import sys\nfrom x2v_jax.cli import streams\nsys.exit(streams.run(lambda: print('é' * 300_000) or 0))"
_SHORT = "import sys\nfrom x2v_jax.cli import streams\nsys.exit(streams.run(lambda: print('é') or 0))"


def ended(code: str, stdout: object, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment or None,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("code", [_LONG, _SHORT])
def test_a_reader_that_has_gone_ends_a_program_quietly(code: str):
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True) as program:
        program.stdout.close()
        said = program.stderr.read()
    assert (program.returncode, said) == (141, "")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("code", [_LONG, _SHORT])
def test_a_full_standard_output_is_a_sentence(code: str):
    with open("/dev/full", "w") as full:
        number, said = ended(code, full)
    assert number == 2 and said.startswith("error: standard output cannot be written") and said.count("\n") == 1


def test_what_a_terminal_does_not_have_is_replaced():
    with subprocess.Popen(
        [sys.executable, "-c", _SHORT], cwd=ROOT, stdout=-1, env={"PYTHONIOENCODING": "ascii"}
    ) as program:
        assert program.stdout.read() == b"?\n"
    assert program.returncode == 0


def test_other_errors_of_files_are_not_taken_for_that():
    code = "from x2v_jax.cli import streams\nstreams.run(lambda: open('/nowhere/at/all'))"
    number, said = ended(code, subprocess.DEVNULL)
    assert number == 1 and "FileNotFoundError" in said


def test_every_program_runs_in_it():
    for name in ("infer", "convert", "train", "train/prepare"):
        assert "sys.exit(streams.run(main" in (ROOT / name / "__main__.py").read_text(), name
