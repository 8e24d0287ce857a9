"""`python -m infer` with causal checkpoints: videos that grow, may end at any moment, and can be gone on from."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models

from infer.__main__ import main
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_safetensors
from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.errors import UserError
from x2v_jax.media.growing_mp4 import VideoStream
from x2v_jax.media.video import read_frames, read_metadata, write_png, write_video
from x2v_jax.models.config import CausalSchedule, Schedule

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Blocks of 2 latent frames: 5 frames and then 8, of 32x48.
CAUSAL = Schedule(
    sampler="step_distill",
    num_inference_steps=2,
    guidance_scale=1.0,
    denoising_step_list=(1000, 500),
    causal=CausalSchedule(block=2, window=4),
    **(tiny_models.SIZE | {"num_frames": 13}),
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning
    yield tmp_path
    warnings.showwarning = show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("checkpoint") / "causal"
    return tiny_models.write_checkpoint(path, schedule=CAUSAL, changes={"variant": "self_forcing"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "t2v", schedule=tiny_models.DISTILLED)


def keys(checkpoint: pathlib.Path, **values: Any) -> list[str]:
    return [f"--config.checkpoint={checkpoint}", *(f"--config.{name}={value}" for name, value in values.items())]


def run(*arguments: str) -> int:
    return main(list(arguments))


def settings(name: str) -> dict[str, Any]:
    return json.loads(pathlib.Path(name).with_suffix(".json").read_text())


def latents(name: str) -> np.ndarray:
    return read_safetensors(name)["latents"].read()


def test_a_video_is_streamed_with_a_live_line(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert run(*keys(checkpoint, prompt="a red circle", seed=3, num_frames=21)) == 0
    out, err = capsys.readouterr()
    assert out == "outputs/a-red-circle-seed3.mp4\n"
    assert read_frames(out.strip()).shape == (21, 32, 48, 3)
    assert "21 frames of 32x48, 2 steps for each block of 2 latent frames, sliding window of 4" in err
    assert "streaming: block 1/3, 5 frames" in err and "streaming: block 3/3, 21 frames" in err
    assert "frames/s" in err and "s ahead of real time" in err and "GB" in err
    assert "1 video in" in err and "denoise" in err and "file" in err
    made = settings(out.strip())
    assert made["size"] == {"frames": 21, "height": 32, "width": 48} and "interrupted" not in made
    carried = read_metadata(out.strip())
    assert made["folder"] == os.getcwd() and made["config"]["checkpoint"] == str(checkpoint)
    made["config"]["checkpoint"] = carried["config"]["checkpoint"]
    assert carried == {name: value for name, value in made.items() if name not in ("size", "folder")}
    assert carried["config"]["rollout_mode"] == "sliding" and carried["config"]["num_frames"] == 21


def test_rerun_repeats_the_video_exactly(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    arguments = keys(checkpoint, prompt="a blue square", output="v.mp4", seed=-1, seconds=1, kv_cache="float32")
    arguments += ["--config.rollout.mode=fragments", "--config.prompt_schedule=0.5: a red circle moves"]
    assert run(*arguments, "--config.save_latents=first.safetensors") == 0
    assert run("--rerun", "v.mp4", "--config.save_latents=again.safetensors") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["v.mp4", "v-1.mp4"] and "warning" not in err
    np.testing.assert_array_equal(latents("first.safetensors"), latents("again.safetensors"))
    assert pathlib.Path("v.mp4").read_bytes() == pathlib.Path("v-1.mp4").read_bytes()
    assert pathlib.Path("v.json").read_text() == pathlib.Path("v-1.json").read_text()
    assert settings("v.mp4")["config"]["prompt_schedule"] == [[0.5, "a red circle moves"]]


@pytest.mark.slow
def test_prompt_files_and_several_videos_work(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("prompts.txt").write_text("a red circle\na blue square\n")
    assert run(*keys(checkpoint, prompt_file="prompts.txt", num_videos=2, num_frames=5, progress="false")) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 4 and out.split()[2] == "outputs/003-a-blue-square-seed0.mp4"
    assert "4 videos" in err and "block 1" not in err
    videos = [read_frames(name) for name in out.split()]
    assert not any(np.array_equal(videos[0], other) for other in videos[1:])
    assert run("--rerun", out.split()[2]) == 0
    np.testing.assert_array_equal(read_frames(capsys.readouterr().out.strip()), videos[2])


@pytest.mark.slow
def test_a_length_on_the_command_line_replaces_that_of_the_config(
    checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    pathlib.Path("mine.py").write_text(
        "from x2v_jax.config.inference import inference_config\n"
        "def get_config():\n"
        f"    return inference_config(checkpoint={str(checkpoint)!r}, prompt='a red circle', output='v.mp4',\n"
        "        rollout_mode='fragments', rollout_window=4, num_blocks=2, num_fragments=2, num_frame_per_block=2,\n"
        "        frame_seq_length=6, progress=False)\n"
    )
    assert run("--config=mine.py") == 0
    assert len(read_frames("v.mp4")) == 21  # 4 + (4 - 2) latent frames
    assert run("--config=mine.py", "--config.seconds=0.3", "--overwrite") == 0
    assert len(read_frames("v.mp4")) == 5
    assert run("--rerun=v.mp4", "--config.num_frames=13", "--overwrite") == 0
    assert len(read_frames("v.mp4")) == 13
    assert run("--config=mine.py", "--config.seconds=2", "--config.num_frames=13") == 2
    assert "num_frames is 13 and seconds is 2.0; the length is said once" in capsys.readouterr().err


@pytest.mark.slow
def test_a_video_goes_on_from_latents_and_from_the_file_itself(checkpoint: pathlib.Path):
    common = keys(checkpoint, prompt="a red circle", progress="false")
    assert (
        run(*common, "--config.num_frames=21", "--config.save_latents=all.safetensors", "--config.output=all.mp4") == 0
    )
    first = ["--config.num_frames=13", "--config.save_latents=a.safetensors", "--config.output=a.mp4"]
    assert run(*common, *first) == 0
    more = ["--config.num_frames=8", "--config.output=b.mp4"]
    second = ["--config.continue_from=a.safetensors", "--config.save_latents=b.safetensors"]
    assert run(*common, *more, *second) == 0
    np.testing.assert_allclose(latents("b.safetensors"), latents("all.safetensors")[:, 4:], atol=0.02)  # bfloat16
    assert read_frames("b.mp4").shape == (8, 32, 48, 3)
    assert list(settings("b.mp4")["inputs"]) == ["a.safetensors"]
    assert run(*common, *more, "--config.continue_from=a.mp4", "--overwrite") == 0
    assert read_frames("b.mp4").shape == (8, 32, 48, 3)


def test_an_image_is_the_first_frame(checkpoint: pathlib.Path):
    write_png(pathlib.Path("i.png"), np.full((32, 48, 3), 200, np.uint8))
    assert run(*keys(checkpoint, prompt="a red circle", image="i.png", output="v.mp4", progress="false")) == 0
    assert read_frames("v.mp4").shape == (13, 32, 48, 3)
    assert list(settings("v.mp4")["inputs"]) == ["i.png"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.num_frames=9"], "num_frames is 9; this model makes 8n+5 frames: use"),
        (
            ["--config.num_frame_per_block=3"],
            "num_frame_per_block is 3, but this checkpoint was trained with blocks of 2",
        ),
        (
            ["--config.num_blocks=3", "--config.rollout.window=4"],
            "num_blocks is 3, a window of 6 latent frames, but this checkpoint was trained with 4",
        ),
        (["--config.rollout.window=3", "--config.rollout.mode=fragments"], "rollout_window is 3 latent frames"),
        (
            ["--config.rollout.window=8"],
            "rollout_window is 8, a window of 8 latent frames, but this checkpoint was trained with 4",
        ),
        (["--config.rollout.sink=3"], "it holds the sink (3) and one block (2)"),
        (["--config.rollout.mode=slide"], "rollout_mode is 'slide'; give one of"),
        (["--config.rollout.mod=full"], "config has no key 'rollout_mod'; did you mean rollout_mode?"),
        (["--rollout.mode=full"], "unknown option --rollout.mode; did you mean --config.rollout.mode=VALUE?"),
        (
            ["--config.frame_seq_length=1560"],
            "frame_seq_length is 1560, but a latent frame of 32x48 has 2 x 3 = 6 tokens",
        ),
        (["--config.denoising_step_list=1000,750"], "denoising_step_list is (1000, 750), but this checkpoint"),
        (["--config.denoising_step_list=500,1000"], "denoising_step_list"),
        (["--config.guidance_scale=6"], "guidance trained in"),
        (["--config.num_fragments=2"], "num_fragments is 2 in rollout_mode 'sliding'"),
        (["--config.seconds=0"], "seconds is 0.0; give a number from 0.001"),
        (["--config.endless=true", "--config.rollout.mode=full"], "endless is True, but rollout_mode 'full' ends"),
        (
            ["--config.endless=true", "--config.seconds=5"],
            "seconds is 5.0 and endless is True; the length is said once",
        ),
        (["--config.endless=true", "--config.num_videos=2"], "config.endless is True for 2 videos"),
        (["--config.context_noise=-0.5"], "context_noise is -0.5; give the timestep"),
        (["--config.kv_cache=int4"], "kv_cache is 'int4'; give one of"),
        (["--config.prompt_schedule=a dog; 5: a cat"], "config.prompt_schedule is 'a dog; 5: a cat'; write"),
        (["--config.prompt_schedule=5: a dog; 3: a cat"], "prompt_schedule has the second 3.0 after 5"),
        (["--config.prompt_schedule=((5, 'a'), 7)"], "prompt_schedule holds 7"),
        (["--config.continue_from=none.mp4"], "continue_from is 'none.mp4', but there is no such file"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    checkpoint: pathlib.Path,
    working_folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
):
    monkeypatch.setattr("infer.start._set_up_jax", lambda cache: pytest.fail("the work began"))
    assert run(f"--config.checkpoint={checkpoint}", "--config.prompt=a red circle", *arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("error: ") and "Traceback" not in err and not out
    assert not list(working_folder.iterdir())


@pytest.mark.parametrize(
    "argument", ["seconds=5", "endless=true", "rollout.mode=sliding", "num_fragments=3", "kv_cache=int8"]
)
def test_a_checkpoint_that_makes_videos_whole_is_said_to(
    whole: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argument: str
):
    monkeypatch.setattr("infer.start._set_up_jax", lambda cache: pytest.fail("the work began"))
    assert run(f"--config.checkpoint={whole}", f"--config.{argument}") == 2
    err = capsys.readouterr().err
    assert "but this checkpoint makes a video as a whole" in err and "use a causal checkpoint" in err


def test_a_continuation_of_another_model_or_size_is_refused(
    checkpoint: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    common = ["--config.prompt=a red circle", "--config.progress=false"]
    assert run(*keys(checkpoint, num_frames=5, save_latents="a.safetensors", output="a.mp4"), *common) == 0
    parts = {
        name: (config, tiny_models.random_parameters(name, config, seed=1))
        for name, config in (
            ("transformer", tiny_models.T2V), ("vae", tiny_models.VAE), ("text_encoder", tiny_models.TEXT)
        )
    }  # fmt: skip
    other = tiny_models.write_checkpoint(
        tmp_path / "other", schedule=CAUSAL, changes={"variant": "self_forcing", "components": parts}
    )
    with SafetensorsWriter("b.safetensors", {"latents": ((16, 2, 4, 6), np.float32)}) as writer:
        writer.write("latents", np.zeros((16, 2, 4, 6), np.float32))
    write_video("c.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
    pathlib.Path("d.mp4").write_bytes(b"no video" * 100)
    monkeypatch.setattr("infer.start._set_up_jax", lambda cache: pytest.fail("the work began"))
    cases = [
        (checkpoint, ["--config.continue_from=a.safetensors", "--config.height=64"], "holds a video of 32x48"),
        (other, ["--config.continue_from=a.safetensors"], "the latents of a.safetensors are another model's"),
        (checkpoint, ["--config.continue_from=b.safetensors"], "was not written by save_latents of a block-by-block"),
        (checkpoint, ["--config.continue_from=c.mp4"], "c.mp4 is 32x32 and this video would be 32x48"),
        (checkpoint, ["--config.continue_from=d.mp4"], "d.mp4 cannot be read as a video"),
    ]
    for path, arguments, message in cases:
        capsys.readouterr()
        assert run(f"--config.checkpoint={path}", *common, *arguments, "--config.num_frames=8") == 2
        assert message in capsys.readouterr().err


class FakePipeline:
    """Blocks without a network. `before`: called before each block with its number."""

    lora_report = None
    before: Callable[[int], None]

    def __init__(self, checkpoint: Any, **options: Any):
        self.closed = False

    def plan(self, request: Any) -> Any:
        return SimpleNamespace(peak=0, host=0)

    def check_memory(self, request: Any) -> Any:
        return self.plan(request)

    def output_size(self, request: Any) -> tuple[Any, int, int]:
        return request.num_frames, 32, 48

    def stream_blocks(self, request: Any) -> Iterator[Any]:
        for index in range(1000):
            type(self).before(index)
            frames = np.full((8 if index else 5, 32, 48, 3), 10 * index % 256, np.uint8)
            yield SimpleNamespace(frames=frames, index=index, seconds={"denoise": 0.1, "vae": 0.1})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    import x2v_jax.pipeline

    monkeypatch.setattr(x2v_jax.pipeline, "Pipeline", FakePipeline)
    monkeypatch.setattr("infer.start._set_up_jax", lambda cache: None)
    return FakePipeline


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """As in a terminal, even where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.asked
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangup_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("block", [0, 1, 4])
def test_a_signal_ends_with_130_and_what_exists_is_kept(
    checkpoint: pathlib.Path,
    fake: type[FakePipeline],
    capsys: pytest.CaptureFixture[str],
    working_folder: pathlib.Path,
    number: int,
    block: int,
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    fake.before = staticmethod(lambda index: signal.raise_signal(number) if index == block else None)
    assert run(*keys(checkpoint, endless="true", output="v.mp4", prompt="a")) == 130
    out, err = capsys.readouterr()
    assert "endless 32x48" in err and "Traceback" not in err
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    if not block:
        assert "interrupted; no video was finished" in err and not out
        assert not list(working_folder.iterdir())
        return
    frames = 5 + 8 * (block - 1)
    assert out == "v.mp4\n" and f"interrupted; v.mp4 is kept with {frames} frames ({frames / 16:.1f} s)" in err
    assert len(read_frames("v.mp4")) == frames
    made = settings("v.mp4")
    assert made["interrupted"] is True and made["size"] == {"frames": frames, "height": 32, "width": 48}
    assert made["config"]["endless"] is True and read_metadata("v.mp4")["config"]["endless"] is True


def test_no_signal_cuts_the_writing_of_a_block_or_of_the_settings_short(
    checkpoint: pathlib.Path,
    fake: type[FakePipeline],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Signals in the middle of the third block's writing, and while the file is closed because of them."""
    append, close = VideoStream.append, VideoStream.close

    def interrupted_append(stream: VideoStream, frames: np.ndarray) -> None:
        if stream.num_frames == 13:
            signal.raise_signal(signal.SIGINT)
        append(stream, frames)

    def interrupted_close(stream: VideoStream, metadata: Any = None) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(stream, metadata)

    fake.before = staticmethod(lambda index: None)
    monkeypatch.setattr(VideoStream, "append", interrupted_append)
    monkeypatch.setattr(VideoStream, "close", interrupted_close)
    assert run(*keys(checkpoint, endless="true", output="v.mp4", prompt="a")) == 130
    assert "v.mp4 is kept with 21 frames" in capsys.readouterr().err
    assert len(read_frames("v.mp4")) == 21 and settings("v.mp4")["interrupted"] is True


def test_a_full_disk_mid_stream_is_one_sentence_and_the_video_is_kept(
    checkpoint: pathlib.Path,
    fake: type[FakePipeline],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def full(descriptor: int, data: Any, position: int) -> int:
        raise OSError(28, "No space left on device")

    def fill(index: int) -> None:
        if index == 2:
            patches.setattr("x2v_jax.media.growing_mp4.os.pwrite", full)

    fake.before = staticmethod(fill)
    with monkeypatch.context() as patches:
        assert run(*keys(checkpoint, endless="true", output="v.mp4", prompt="a")) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err and "error: cannot go on writing 'v.mp4': No space left on device" in err
    assert "Its first 13 frames are kept and playable" in err
    assert len(read_frames("v.mp4")) == 13


def test_a_failure_of_the_model_mid_stream_keeps_the_blocks_before(
    checkpoint: pathlib.Path, fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]
):
    def fail(index: int) -> None:
        if index == 2:
            raise UserError("the latents of block 2 hold NaN")

    fake.before = staticmethod(fail)
    assert run(*keys(checkpoint, endless="true", output="v.mp4", prompt="a")) == 2
    err = capsys.readouterr().err
    assert "error: the latents of block 2 hold NaN" in err and "v.mp4 is kept with 13 frames (0.8 s)" in err
    assert len(read_frames("v.mp4")) == 13 and settings("v.mp4")["interrupted"] is True


@pytest.mark.slow
def test_block_k_is_in_the_file_before_block_k_plus_2_is_begun(
    checkpoint: pathlib.Path, fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]
):
    seen: list[int] = []

    def look(index: int) -> None:
        seen.append(len(read_frames("v.mp4")) if index else 0)
        if index == 5:
            raise KeyboardInterrupt

    fake.before = staticmethod(look)
    assert run(*keys(checkpoint, endless="true", output="v.mp4", prompt="a")) == 130
    assert seen == [0, 5, 13, 21, 29, 37]


def started(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "infer", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_endless_videos_grow_until_they_are_interrupted(checkpoint: pathlib.Path):
    process = started(*keys(checkpoint, endless="true", prompt="a red circle", output="v.mp4"))
    assert process.stderr is not None
    while line := process.stderr.readline():
        if "block 1," in line:
            break
    growing = len(read_frames("v.mp4"))
    assert growing >= 5
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "v.mp4\n" and "Traceback" not in err
    frames = len(read_frames("v.mp4"))
    assert frames >= growing and f"v.mp4 is kept with {frames} frames" in err
    assert settings("v.mp4")["size"]["frames"] == frames and settings("v.mp4")["interrupted"] is True


@pytest.mark.slow
def test_a_killed_run_leaves_a_video_that_reruns(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    process = started(*keys(checkpoint, endless="true", prompt="a red circle", output="v.mp4"))
    assert process.stderr is not None
    while line := process.stderr.readline():
        if "block 1," in line:
            break
    process.kill()
    process.communicate(timeout=60)
    frames = read_frames("v.mp4")
    assert len(frames) % 8 == 5 and not pathlib.Path("v.json").exists()
    assert run("--rerun=v.mp4", "--config.num_frames=5") == 0
    np.testing.assert_array_equal(read_frames(capsys.readouterr().out.strip()), frames[:5])
