"""Many videos in a run: prompts with their own fields, pictures, and going on where a run stopped."""

import io
import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models

from infer.__main__ import main
from infer.asked import asked_videos, is_there
from x2v_jax.config.inference import inference_config
from x2v_jax.errors import UserError
from x2v_jax.media.video import read_frames, read_metadata, write_png
from x2v_jax.request import Request


@pytest.fixture(autouse=True)
def working_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning
    yield tmp_path
    warnings.showwarning = show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("many") / "t2v", schedule=tiny_models.DISTILLED)


def run(checkpoint: pathlib.Path, **values: Any) -> int:
    values = {"num_frames": 1, "dtype": "float32"} | values
    return main([f"--config.checkpoint={checkpoint}", *(f"--config.{name}={value}" for name, value in values.items())])


def test_a_run_goes_on_where_it_stopped(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("p.txt").write_text("# three\na red circle\na blue square\na red square\n")
    assert run(checkpoint, prompt_file="p.txt") == 0
    first, second, third = capsys.readouterr().out.split()
    before = {name: pathlib.Path(name).stat().st_mtime_ns for name in (first, third)}
    pathlib.Path(second).with_suffix(".json").unlink()  # as if the run was killed before it
    assert run(checkpoint, prompt_file="p.txt", existing="skip") == 0
    out, err = capsys.readouterr()
    assert out.split() == [second] and "2 of 3 videos are there and are skipped" in err and "warning" not in err
    assert {name: pathlib.Path(name).stat().st_mtime_ns for name in before} == before
    assert run(checkpoint, prompt_file="p.txt", existing="skip") == 0
    out, err = capsys.readouterr()
    assert not out and "3 of 3 videos are there" in err
    assert run(checkpoint, prompt_file="p.txt", existing="overwrite") == 0
    assert capsys.readouterr().out.split() == [first, second, third]
    assert run(checkpoint, existing="keep") == 2 and "give one of rename, skip, overwrite" in capsys.readouterr().err
    assert run(checkpoint, existing="skip", seed=-1) == 2 and "give a seed" in capsys.readouterr().err


def test_what_is_there_and_is_another_video_is_said(tmp_path: pathlib.Path):
    video = tmp_path / "v.mp4"
    video.touch()
    assert not is_there(video, Request("a"))
    for content, there in (("{", False), ("[]", False), ('{"config": {}, "interrupted": true}', False)):
        video.with_suffix(".json").write_text(content)
        assert is_there(video, Request("a")) is there
    video.with_suffix(".json").write_text(json.dumps({"config": {"prompt": "b", "seed": 0}}))
    with pytest.warns(UserWarning, match="made with another prompt; it is kept"):
        assert is_there(video, Request("a", seed=0))


def test_json_lines_say_seed_size_and_output(
    checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = [
        {"prompt": "a red circle", "seed": 5, "size": "48x32", "output": "x/red.mp4"},
        {"prompt": "a blue square", "output": "blue.gif"},
    ]
    text = "\n".join(map(json.dumps, lines))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run(checkpoint, prompt_file="-", output="videos/") == 0
    assert capsys.readouterr().out.split() == ["videos/x/red.mp4", "videos/blue.gif"]
    assert read_frames("videos/x/red.mp4").shape == (1, 48, 32, 3)
    assert read_metadata("videos/x/red.mp4")["config"]["seed"] == 5
    assert pathlib.Path("videos/blue.gif").read_bytes()[:4] == b"GIF8"
    pathlib.Path("p.jsonl").write_text('{"prompt": "a", "seed": "x"}')
    assert run(checkpoint, prompt_file="p.jsonl") == 2
    assert "p.jsonl, line 1: seed is 'x'; give a whole number" in capsys.readouterr().err


def test_one_frame_is_a_picture_and_more_are_none(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert run(checkpoint, output="a.png", prompt="a red circle") == 0
    assert pathlib.Path("a.png").read_bytes()[1:4] == b"PNG" and pathlib.Path("a.json").is_file()
    assert main(["--rerun=a.png", "--config.output=b.png"]) == 0
    assert pathlib.Path("a.png").read_bytes() == pathlib.Path("b.png").read_bytes()
    capsys.readouterr()
    assert run(checkpoint, output="c.png", num_frames=5) == 2 and "one picture" in capsys.readouterr().err
    assert run(checkpoint, output="c.avi") == 2 and "must end in .mp4, .gif or .webp" in capsys.readouterr().err


def test_pictures_of_a_folder_or_a_pattern_make_a_video_each(tmp_path: pathlib.Path):
    for name in ("b.png", "a.png", "c.jpg"):
        write_png(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "notes.txt").touch()
    found = asked_videos(inference_config(image=str(tmp_path), prompt="x", num_videos=2))
    assert [(video.name, video.fields["seed"]) for video in found] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1),
    ]  # fmt: skip
    assert [video.name for video in asked_videos(inference_config(image=str(tmp_path / "*.png")))] == ["a", "b"]
    (one,) = asked_videos(inference_config(image="a.png"))
    assert (one.fields["image"], one.name) == ("a.png", "")
    for image, sentence in ((str(tmp_path / "*.gif"), "no file fits"), ("empty", "no picture in the folder")):
        pathlib.Path("empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=sentence):
            asked_videos(inference_config(image=image))


def test_a_model_of_the_hub_is_told_how_to_come_here(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    for name, is_hub in (("Wan-AI/Wan2.1-T2V-14B", True), ("checkpoints/wan", False), ("./a/b", False), ("a", False)):
        assert main([f"--config.checkpoint={name}"]) == 2
        err = capsys.readouterr().err
        assert ("hf download Wan-AI/Wan2.1-T2V-14B --local-dir Wan2.1-T2V-14B" in err) is is_hub
        assert "does not exist" in err


def test_the_published_negative_prompt_has_a_name(checkpoint: pathlib.Path):
    from x2v_jax import Pipeline

    base = tiny_models.write_checkpoint(pathlib.Path("base"))
    resolved = Pipeline.from_checkpoint(base).resolve(Request("a", negative_prompt="wan"))
    assert resolved.negative_prompt.startswith("色调艳丽") and resolved.prompts[0] == resolved.negative_prompt
