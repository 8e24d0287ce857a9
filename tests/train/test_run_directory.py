"""A run directory belongs to one process and one run, which may be gone on with for longer."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from test_loop import Regression, leaves, make_config

from train.loop import train
from train.run_directory import RunDirectory
from x2v_jax.checkpoint.files.lock import FolderLock
from x2v_jax.config.training import phase
from x2v_jax.errors import UserError

FIRST = phase("first", steps=10, learning_rate=0.05, batch_size=4)


def plain(steps: int, **settings: float):
    return phase("last", steps=steps, learning_rate=0.02, batch_size=8, **settings)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((FIRST, plain(10)), (FIRST, plain(25))),
        ((FIRST,), (FIRST, plain(25))),
        ((FIRST, plain(10)), (FIRST, plain(10), phase("new", steps=15, learning_rate=0.01, batch_size=4))),
    ],
)
def test_a_longer_run_is_the_one_that_was_as_long_from_the_start(
    before: tuple, after: tuple, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    whole = leaves(train(make_config(tmp_path / "whole", phases=after), Regression()))
    train(make_config(tmp_path / "parts", phases=before), Regression())
    extended = leaves(train(make_config(tmp_path / "parts", phases=after), Regression()))
    for ours, theirs in zip(extended, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert "learning rate" not in capsys.readouterr().out


def test_with_decay_it_says_where_the_rate_goes_on(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    decay = {"decay_share": 0.5, "final_scale": 0.1}
    train(make_config(tmp_path / "run", phases=(plain(20, **decay),)), Regression())
    state = train(make_config(tmp_path / "run", phases=(plain(60, **decay),)), Regression())
    assert "model: the learning rate had come to 0.002; in the longer phase it is 0.02" in capsys.readouterr().out
    assert int(state.step) == 60


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        ((FIRST, plain(9)), r"\(phases.1.steps was 10 and is 9\)"),
        (
            (phase("first", steps=12, learning_rate=0.05, batch_size=4), plain(10)),
            r"\(phases.0.steps was 10 and is 12\)",
        ),
        ((FIRST, plain(20, warmup=3)), r"\(phases.1.steps was 10 and is 20; phases.1.warmup was 0 and is 3\)"),
        ((FIRST,), r"phases.1.batch_size was 8 and is None"),
    ],
)
def test_any_other_change_of_phases_is_another_run(phases: tuple, sentence: str, tmp_path: pathlib.Path):
    RunDirectory(make_config(tmp_path, phases=(FIRST, plain(10)))).release()
    with pytest.raises(UserError, match=sentence):
        RunDirectory(make_config(tmp_path, phases=phases))
    RunDirectory(make_config(tmp_path, phases=(FIRST, plain(10)))).release()  # the refused one has let go


def test_a_second_process_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path: pathlib.Path):
    code = (
        "import pathlib, sys, time\nfrom x2v_jax.checkpoint.files.lock import FolderLock\n"
        f"lock = FolderLock(pathlib.Path({str(tmp_path)!r}), 'x')\nprint('held', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"is in use by process {first.pid} on \S+ since 20.*another --config.run_dir"
        ):
            RunDirectory(make_config(tmp_path))
        first.kill()
    RunDirectory(make_config(tmp_path)).release()


def test_without_locks_of_files_there_is_a_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with FolderLock(tmp_path, "x"):
        assert "is not locked (Operation not supported)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_damaged_config_is_a_sentence(content: bytes, tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json.*resume_any"):
        RunDirectory(make_config(tmp_path))
    RunDirectory(make_config(tmp_path, resume_any=True)).release()
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "regression"


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match=r"config.run_dir is '.*choose another --config.run_dir"):
            RunDirectory(make_config(place))
