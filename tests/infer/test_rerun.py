"""`--rerun`: from any folder, with or without the JSON; what an mp4 tells of the machine that made it."""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_models

from infer.__main__ import main
from infer.cli import help_text
from infer.rerun import portable_names
from x2v_jax.media.video import read_frames, read_metadata


@pytest.fixture(autouse=True)
def working_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    show = warnings.showwarning
    yield tmp_path / "work"
    warnings.showwarning = show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "t2v", schedule=tiny_models.DISTILLED)


def make(*arguments: str) -> int:
    return main(["--config.prompt=a red circle", "--config.num_frames=1", "--config.dtype=float32", *arguments])


def test_a_video_is_made_again_from_another_folder(
    checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(checkpoint, "ckpt")
    assert make("--config.checkpoint=ckpt", "--config.output=videos/v.mp4") == 0
    frames, beside = read_frames("videos/v.mp4"), json.loads(pathlib.Path("videos/v.json").read_text())
    assert beside["folder"] == os.getcwd() and beside["config"]["checkpoint"] == "ckpt"
    pathlib.Path("../elsewhere").mkdir()
    monkeypatch.chdir("../elsewhere")
    for given in ("../work/videos/v.mp4", "../work/videos/v.json"):
        assert main(["--rerun", given, "--config.output=again.mp4", "--overwrite"]) == 0
        np.testing.assert_array_equal(read_frames("again.mp4"), frames)
    assert "warning" not in capsys.readouterr().err
    shutil.move("../work/videos/v.mp4", "v.mp4")  # without its JSON
    assert main(["--rerun=v.mp4"]) == 2
    assert "its checkpoint 'ckpt' is neither here" in capsys.readouterr().err
    assert main(["--rerun=v.mp4", "--config.checkpoint=../work/ckpt", "--config.output=again-2.mp4"]) == 0
    np.testing.assert_array_equal(read_frames("again-2.mp4"), frames)


def test_of_two_checkpoints_of_one_name_the_one_that_made_the_video_is_taken(
    checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    shutil.copytree(checkpoint, "ckpt")
    assert make("--config.checkpoint=ckpt", "--config.output=v.mp4") == 0
    tiny_models.write_checkpoint(tmp_path / "other" / "ckpt")
    monkeypatch.chdir(tmp_path / "other")
    assert main(["--rerun=../work/v.mp4", "--config.output=v.mp4"]) == 0
    np.testing.assert_array_equal(read_frames("v.mp4"), read_frames("../work/v.mp4"))


def test_the_mp4_says_nothing_of_the_machine_and_nothing_at_all_when_told(checkpoint: pathlib.Path):
    assert make(f"--config.checkpoint={checkpoint}", "--config.output=v.mp4") == 0
    assert str(checkpoint).encode() not in pathlib.Path("v.mp4").read_bytes()
    assert os.getcwd().encode() not in pathlib.Path("v.mp4").read_bytes() and "folder" not in read_metadata("v.mp4")
    assert make(f"--config.checkpoint={checkpoint}", "--config.output=w.mp4", "--config.embed_settings=false") == 0
    assert b"a red circle" not in pathlib.Path("w.mp4").read_bytes()
    assert main(["--rerun=w.mp4", "--config.output=again.mp4"]) == 0
    np.testing.assert_array_equal(read_frames("again.mp4"), read_frames("v.mp4"))


def test_names_in_an_mp4_are_relative_or_names(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    monkeypatch.chdir(tmp_path)
    far, near = "/srv/models/x/l.safetensors", str(tmp_path / "a" / "l.safetensors")
    assert portable_names([far, near, "b/l.safetensors"]) == {
        far: "l.safetensors",
        near: "a/l.safetensors",
        "b/l.safetensors": "b/l.safetensors",
    }
    assert set(portable_names([far, "/opt/y/l.safetensors"]).values()) == {"l.safetensors", "2/l.safetensors"}


def test_the_json_of_a_video_is_no_config(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert make(f"--config.checkpoint={checkpoint}", "--config.output=v.mp4") == 0
    assert main(["--config=v.json"]) == 2
    assert "write --rerun v.json" in capsys.readouterr().err
    pathlib.Path("other.json").write_text("{}")
    assert main(["--rerun=other.json"]) == 2 and "carries no settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step.json", "settings"])
def test_lightx2vs_json_is_a_config_by_itself(name: str, checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path(name).write_text('{"infer_steps": 3, "denoising_step_list": [1000, 750, 500]} // comment')
    assert main([f"--config={name}", f"--config.checkpoint={checkpoint}"]) == 2
    assert "was distilled for (1000, 750, 500, 250)" in capsys.readouterr().err
    assert main(["--config=none.json"]) == 2 and "none.json cannot be read" in capsys.readouterr().err


def test_help_tells_the_defaults_of_the_config_that_runs():
    text = help_text()
    assert "[assets/shapes_t2v_4step]" in text and "[assets/shapes]" not in text
    assert "as configs/shapes/t2v.py has them" in text and "[a red circle moves left]" in text
