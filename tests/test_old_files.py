"""Files that version 0.1.0 wrote open, rerun and resume: tests/fixtures/v0_1, which no later program writes again."""

import json
import os
import pathlib
import shutil
import signal
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from convert.__main__ import main as convert
from infer.__main__ import main as infer
from train.cli import main as train_main
from train.cli import make_task
from train.data.check import check
from train.loop import Stopped, train
from train.prepare.__main__ import main as prepare
from x2v_jax import Pipeline
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.config.flags import load_config
from x2v_jax.generate import programs
from x2v_jax.media.video import read_frames, read_metadata

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "v0_1"
PROMPT = "a red circle moves left"
SIZE = ["--height", "32", "--width", "32", "--num-frames", "5"]


@pytest.fixture(autouse=True)
def copies(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The files as a user has them: in the present folder, and free to change."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning
    yield tmp_path
    warnings.showwarning = show


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version", "quantization", "smoothing"),
    [("format_1", 1, None, None), ("format_2", 2, "int8", None), ("format_3", 3, "float8_e4m3fn", 0.5)],
)
def test_a_checkpoint_of_each_format_makes_a_video(
    name: str, version: int, quantization: str | None, smoothing: float | None
):
    checkpoint = open_checkpoint(name)
    assert checkpoint.model["format_version"] == version
    assert (checkpoint.quantization("transformer"), checkpoint.smoothing("transformer")) == (quantization, smoothing)
    frames = Pipeline.from_checkpoint(name)(PROMPT, seed=3)
    assert frames.shape == (5, 32, 48, 3) and frames.std() > 0


def test_a_calibration_smooths_a_conversion():
    command = ["wan", "format_1", "smoothed", "--quantize", "fp8", "--smooth", "calibration.safetensors"]
    assert convert(command) == 0
    ours, theirs = (open_checkpoint(name).tensors("transformer") for name in ("smoothed", "format_3"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Factors are powers, whose last digit depends on the machine.
        np.testing.assert_allclose(tensor.read().astype(np.float32), theirs[name].read().astype(np.float32), rtol=0.13)


@pytest.mark.slow
def test_a_video_is_made_again_from_the_settings_that_it_carries(capsys: pytest.CaptureFixture[str]):
    settings = read_metadata("video.mp4")
    assert settings == json.loads(pathlib.Path("video.json").read_text())
    assert infer(["--rerun", "video.mp4", "--config.output=again.mp4"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert read_metadata("again.mp4")["config"].items() >= settings["config"].items()
    again, before = (read_frames(name).astype(np.float32) for name in ("again.mp4", "video.mp4"))
    assert np.abs(again - before).mean() < 0.5  # of 255: another processor rounds otherwise


@pytest.mark.slow
@pytest.mark.parametrize("earlier", ["causal.mp4", "causal_latents.safetensors"])
def test_a_video_goes_on_from_an_old_one(earlier: str, capsys: pytest.CaptureFixture[str]):
    keys = {"checkpoint": "causal", "prompt": PROMPT, "seconds": 0.5, "continue_from": earlier, "output": "more.mp4"}
    assert infer([f"--config.{name}={value}" for name, value in keys.items()]) == 0
    assert "warning" not in capsys.readouterr().err
    assert read_frames("more.mp4").shape == (12, 32, 48, 3)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str]):
    config = load_config("run_config.py")
    task = make_task(config)
    batch = task.batch

    def stop_in_the_next_step(role: str, step: int, phase: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(role, step, phase)

    task.batch = stop_in_the_next_step
    with pytest.raises(Stopped, match="step 3"):
        train(config, task)
    assert "resumed at step 2" in capsys.readouterr().out
    lines = [json.loads(line) for line in pathlib.Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert abs(lines[2]["critic/loss"] / lines[1]["critic/loss"] - 1) < 0.5


def test_a_run_is_exported():
    assert train_main(["--config=run_config.py", "--export=student"]) == 0
    student = open_checkpoint("student")
    assert student.variant == "distill" and student.holder("vae").path.samefile("format_1")


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("prompts", ["prompts", "prompts.txt", "prompts", "--checkpoint", "teacher"]),
        (
            "latents",
            ["videos", "clips.jsonl", "latents", "--checkpoint", "teacher", *SIZE],
        ),
        ("trajectories", None),
    ],
)
def test_a_cache_is_whole_and_is_not_made_again(folder: str, command: list[str] | None):
    shards = {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).glob("*.safetensors")}
    assert shards and not check(folder).problems
    assert (prepare(command) if command else train_main(["--config=pairs_config.py"])) == 0
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).glob("*.safetensors")} == shards


def test_compiled_programs_are_taken_where_they_fit_and_refused_in_a_sentence_elsewhere(copies: pathlib.Path):
    with zipfile.ZipFile("compiled_programs.zip") as file:
        manifest = json.loads(file.read("manifest.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert programs.install("compiled_programs.zip", copies / "cache", manifest["made_for"])
    assert {path.name for path in (copies / "cache").iterdir()} == manifest["programs"].keys()
    here = programs.identity(manifest["made_for"]["config"])
    with pytest.warns(UserWarning, match="was made for .*device cpu another and this is .*; everything is compiled"):
        assert not programs.install("compiled_programs.zip", copies / "none", here)
    assert not (copies / "none").exists()
