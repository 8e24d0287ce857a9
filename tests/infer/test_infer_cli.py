"""`python -m infer`: files, names, settings that repeat a video, and a sentence for every mistake."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models

from infer.__main__ import main
from infer.outputs import free_path
from infer.settings import _slug
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_safetensors
from x2v_jax.checkpoint.published.published_schedules import SCHEDULES
from x2v_jax.config import flags
from x2v_jax.config.inference import KEYS, inference_config
from x2v_jax.errors import UserError
from x2v_jax.media.video import read_frames, read_metadata, write_video
from x2v_jax.request import Request

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("base", "distill", "causvid", "self_forcing")
    for path in (ROOT / "configs" / folder).glob("[!_]*.py")
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning
    yield tmp_path
    warnings.showwarning = show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "t2v", schedule=tiny_models.DISTILLED)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


def keys(checkpoint: pathlib.Path, **values: Any) -> list[str]:
    return [f"--config.checkpoint={checkpoint}", *(f"--config.{name}={value}" for name, value in values.items())]


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_a_video_is_written_and_its_path_printed(
    checkpoint: pathlib.Path, working_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*keys(checkpoint, prompt="a red circle", seed=3)) == 0
    out, err = capsys.readouterr()
    assert out == "outputs/a-red-circle-seed3.mp4\n"
    assert read_frames(working_folder / out.strip()).shape == (5, 32, 48, 3)
    assert "4 steps" in err and "peak memory" in err and "predicted" in err and "denoise" in err
    settings = json.loads((working_folder / "outputs/a-red-circle-seed3.json").read_text())
    carried = read_metadata(working_folder / out.strip())
    assert settings.pop("folder") == str(working_folder)
    assert settings == carried | {"config": carried["config"] | {"checkpoint": str(checkpoint)}}
    assert settings["config"]["denoising_step_list"] == [1000, 750, 500, 250] and settings["config"]["seed"] == 3


def test_rerun_repeats_the_video_exactly(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    arguments = keys(checkpoint, prompt="a blue square", output="videos/first.mp4", seed=-1)
    assert run(*arguments, "--config.save_latents=first.safetensors") == 0
    assert run("--rerun", "videos/first.mp4", "--config.save_latents=again.safetensors") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["videos/first.mp4", "videos/first-1.mp4"] and "warning" not in err
    first, again = (read_safetensors(f"{name}.safetensors")["latents"].read() for name in ("first", "again"))
    np.testing.assert_array_equal(first, again)
    assert pathlib.Path("videos/first.mp4").read_bytes() == pathlib.Path("videos/first-1.mp4").read_bytes()


def test_rerun_takes_changes_and_notices_another_checkpoint(
    checkpoint: pathlib.Path, base: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*keys(checkpoint, prompt="a blue square", output="v.mp4", num_frames=1)) == 0
    assert run("--rerun=v.mp4", "--config.seed=5", "--config.output=w.mp4") == 0
    assert read_metadata("w.mp4")["config"] | {"seed": 0} == read_metadata("v.mp4")["config"]
    capsys.readouterr()
    assert run("--rerun=v.mp4", f"--config.checkpoint={base}") == 2
    assert "is not distilled" in capsys.readouterr().err
    assert run("--rerun=v.mp4", "--config=configs/shapes/t2v.py") == 2
    assert "leave --config out" in capsys.readouterr().err
    pathlib.Path("x.mp4").write_bytes(b"no video")
    assert run("--rerun=x.mp4") == 2 and run("--rerun=none.mp4") == 2


def test_a_base_checkpoint_reruns_too_and_changed_inputs_are_noticed(
    base: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    shape = (16, 1, 4, 6)
    for seed, name in enumerate(("n", "m")):
        with SafetensorsWriter(f"{name}.safetensors", {"noise": (shape, np.float32)}) as writer:
            writer.write("noise", np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    arguments = keys(base, prompt="a red circle", output="v.mp4", num_frames=1, initial_noise="n.safetensors")
    assert run(*arguments) == 0 and run("--rerun=v.mp4") == 0
    assert "warning" not in capsys.readouterr().err
    np.testing.assert_array_equal(read_frames("v.mp4"), read_frames("v-1.mp4"))
    os.replace("m.safetensors", "n.safetensors")
    assert run("--rerun=v.mp4") == 0
    assert "n.safetensors has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_prompt_files_give_one_numbered_video_a_line(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("prompts.txt").write_text("a red circle\n\n  a blue square  \r\n")
    arguments = keys(checkpoint, prompt_file="prompts.txt", num_videos=2, seed=7, num_frames=1, progress="false")
    assert run(*arguments) == 0
    out, err = capsys.readouterr()
    assert out.split() == [
        "outputs/001-a-red-circle-seed7.mp4",
        "outputs/002-a-red-circle-seed8.mp4",
        "outputs/003-a-blue-square-seed7.mp4",
        "outputs/004-a-blue-square-seed8.mp4",
    ]
    assert "4 videos" in err
    videos = [read_frames(name) for name in out.split()]
    assert not any(np.array_equal(videos[0], other) for other in videos[1:])
    assert run("--rerun", "outputs/003-a-blue-square-seed7.mp4") == 0
    again = capsys.readouterr().out.strip()
    assert again == "outputs/003-a-blue-square-seed7-1.mp4"
    np.testing.assert_array_equal(read_frames(again), videos[2])


def test_existing_files_are_kept_unless_told(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    arguments = keys(checkpoint, prompt="a red circle", output="v.mp4", num_frames=1)
    assert run(*arguments) == 0
    first = pathlib.Path("v.mp4").read_bytes()
    assert run(*arguments, "--config.seed=9") == 0
    assert pathlib.Path("v.mp4").read_bytes() == first and pathlib.Path("v-1.mp4").exists()
    assert run(*arguments, "--config.seed=9", "--overwrite") == 0
    assert pathlib.Path("v.mp4").read_bytes() == pathlib.Path("v-1.mp4").read_bytes() != first
    pathlib.Path("l.safetensors").touch()
    capsys.readouterr()
    assert run(*arguments, "--config.save_latents=l.safetensors") == 2
    assert "l.safetensors exists; give another name or --overwrite" in capsys.readouterr().err


def test_names_are_made_from_prompts_of_any_script():
    assert _slug("A red circle, moves LEFT!") == "a-red-circle-moves-left"
    assert _slug("../../etc/passwd") == "etc-passwd"
    assert _slug("") == _slug("...") == "video"
    assert _slug("один красный круг") == "один-красный-круг"
    assert all(len(_slug(text).encode()) <= 60 for text in ("word " * 100, "x" * 5000, "我" * 300))


def test_free_names_skip_videos_and_their_settings(working_folder: pathlib.Path):
    path = working_folder / "a.mp4"
    assert free_path(path) == path
    path.touch()
    (working_folder / "a-1.json").touch()
    assert free_path(path).name == "a-2.mp4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.heigth=480"], "config has no key 'heigth'; did you mean height?"),
        (["--config.height=abc"], "config.height is 'abc'; give a whole number"),
        (["--config.guidance_scale=much"], "config.guidance_scale is 'much'; give a number"),
        (["--config.keep_encoders=perhaps"], "config.keep_encoders is 'perhaps'; write true or false"),
        (["--config.height=100"], "height is 100; this model makes multiples of 16: use 96 or 112"),
        (["--config.height=100", "--config.num_frames=6"], "2 problems with the request"),
        (["--config.guidance_scale=5"], "guidance trained in"),
        (["--config.denoising_step_list=1000,500"], "was distilled for"),
        (["--config.denoising_step_list=a,b"], "denoising_step_list holds 'a'"),
        (["--config.task=i2v"], "config.task is 'i2v', but"),
        (["--config.task=v2v"], "config.task is 'v2v'; give 't2v' or 'i2v'"),
        (["--config.image=a.png"], "'a.png', but there is no such file"),
        (["--config.dtype=int8"], "config.dtype is 'int8'"),
        (["--config.vae_decode=fast"], "config.vae_decode is 'fast'"),
        (["--config.num_videos=0"], "config.num_videos is 0"),
        (["--config.seed=-2"], "config.seed is -2"),
        (["--config.seed=18446744073709551615", "--config.num_videos=2"], "seed is 18446744073709551616"),
        (["--config.output=a.avi"], "must end in .mp4"),
        (["--config.output="], "config.output is empty"),
        (["--config.prompt_file=none.txt"], "config.prompt_file: none.txt cannot be read"),
        (["--config.prompt_file=a", "--config.prompt=b"], "both given"),
        (["--config.lora=none.safetensors"], "config.lora: 'none.safetensors' is no file"),
        (["--config.lora=((1,2),)"], "config.lora holds (1, 2)"),
        (["--config.checkpoint=nowhere"], "checkpoint 'nowhere' does not exist"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=configs/distil/wan_t2v_4step.py"], "did you mean configs/distill/wan_t2v_4step.py?"),
        (["--config=configs/lightx2v.py"], "write --config=configs/lightx2v.py:FILE.json"),
        (["--config=configs/shapes/t2v.py:x"], "get_config takes no argument"),
        (["--prompt=a cat"], "unknown option --prompt; did you mean --config.prompt=VALUE?"),
        (["--image_path", "a.png"], "unknown option --image_path; write --config.image=FILE"),
        (["--rerunn=a"], "did you mean --rerun?"),
        (["--zzz"], "unknown option --zzz; known: --rerun"),
        (["a cat"], "unexpected argument 'a cat'"),
        (["--config"], "--config needs a value"),
        (["--overwrite=1"], "--overwrite takes no value"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    checkpoint: pathlib.Path,
    working_folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
):
    assert run(f"--config.checkpoint={checkpoint}", *arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("error: ") and "Traceback" not in err and not out
    assert not list(working_folder.iterdir())


def test_unreadable_prompt_files_are_refused(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("empty.txt").write_text("\n  \n")
    pathlib.Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    assert run(*keys(checkpoint, prompt_file="empty.txt")) == 2
    assert "has no prompt in it" in capsys.readouterr().err
    assert run(*keys(checkpoint, prompt_file="binary.txt")) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_config_files_that_do_not_load_are_explained(capsys: pytest.CaptureFixture[str]):
    bad = {
        "syntax": "def get_config(:\n",
        "raises": "def get_config():\n    return 1 / 0\n",
        "empty": "x = 1\n",
        "wrong": "def get_config():\n    return 3\n",
    }
    for name, text in bad.items():
        pathlib.Path(f"{name}.py").write_text(text)
        assert run(f"--config={name}.py") == 2
        err = capsys.readouterr().err
        assert f"--config={name}.py" in err and "Traceback" not in err
        assert {"syntax": "SyntaxError", "raises": "raises.py:2", "empty": "get_config", "wrong": "int"}[name] in err


def test_loras_are_merged_and_accounted_for(base: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    name = "diffusion_model.blocks.1.ffn.0.lora_"
    down, up = rng.standard_normal((2, 32)).astype(np.float32), rng.standard_normal((48, 2)).astype(np.float32)
    arrays = {f"{name}A.weight": down, f"{name}B.weight": up}
    with SafetensorsWriter("l.safetensors", {key: (a.shape, a.dtype) for key, a in arrays.items()}) as writer:
        for key, array in arrays.items():
            writer.write(key, array)
    arguments = keys(base, prompt="a red circle", num_frames=1, denoising_step_list="1000,500", output="v.mp4")
    assert run(*arguments, "--config.lora=l.safetensors:0.5") == 0
    assert "l.safetensors" in capsys.readouterr().err
    recorded = read_metadata("v.mp4")
    assert recorded["config"]["lora"] == [["l.safetensors", 0.5]] and list(recorded["inputs"]) == ["l.safetensors"]
    assert run("--rerun=v.mp4") == 0
    np.testing.assert_array_equal(read_frames("v.mp4"), read_frames("v-1.mp4"))
    assert run(*keys(base, denoising_step_list="1000,500")) == 2


def test_own_config_files_work(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("mine.py").write_text(
        "from x2v_jax.config.inference import inference_config\n"
        "def get_config(prompt):\n"
        f"    return inference_config(checkpoint={str(checkpoint)!r}, prompt=prompt, num_frames=1, output='mine.mp4')\n"
    )
    assert run("--config=mine.py:a blue circle") == 0
    assert read_metadata("mine.mp4")["config"]["prompt"] == "a blue circle"


def test_an_output_that_cannot_be_written_is_said(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    pathlib.Path("file").touch()
    assert run(*keys(checkpoint, output="file/", num_frames=1)) == 2
    assert "file is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_load_and_say_what_they_need(name: str):
    config = flags.load_config(name)
    assert set(config.keys()) == {key.name for key in KEYS}
    text = (ROOT / name).read_text()
    assert all(f"\n{word}:" in text for word in ("Hardware", "Time", "Result"))


def test_shipped_causal_configs_load_and_agree_with_the_published_settings():
    config: Any = flags.load_config("configs/shapes/t2v_causal.py")
    assert config.checkpoint == "assets/shapes_causal"
    causvid: Any = flags.load_config("configs/causvid/wan_t2v_causvid.py")
    assert causvid.rollout_window == causvid.num_blocks * causvid.num_frame_per_block == 21
    assert causvid.frame_seq_length == causvid.height // 16 * (causvid.width // 16)
    for name, variant in (
        ("causvid/wan_t2v_causvid", "causvid"),
        ("self_forcing/wan_t2v_self_forcing", "self_forcing"),
    ):
        config = flags.load_config(f"configs/{name}.py")
        schedule = SCHEDULES[variant]
        assert schedule.causal is not None
        assert config.denoising_step_list == schedule.denoising_step_list
        assert config.warp_denoising_step == schedule.warp_denoising_step
        assert config.num_frame_per_block == schedule.causal.block and config.rollout_window == schedule.causal.window
        assert config.rollout_mode == schedule.causal.mode


def test_every_request_field_can_be_set_from_a_config():
    assert set(Request.field_names()) <= set(inference_config().keys())


def test_values_keep_their_types():
    config: Any = inference_config()
    texts = {"height": "480", "shift": "5", "lora": '[("a.safetensors", 1.0)]', "denoising_step_list": "1000, 500"}
    values = {name: flags.parse_value(config, name, text) for name, text in texts.items()}
    assert values == {
        "height": 480,
        "shift": 5.0,
        "lora": (("a.safetensors", 1.0),),
        "denoising_step_list": (1000, 500),
    }
    assert flags.parse_value(config, "lora", "a.safetensors:0.8") == ("a.safetensors:0.8",)
    assert flags.parse_value(config, "height", "None") is None
    assert flags.parse_value(config, "prompt", "None") == "None"
    line = flags.parse(["--config.rollout.mode=full"], default_config="configs/shapes/t2v.py", options={})
    assert line.overrides == {"rollout_mode": "full"} and line.config.rollout_mode == "full"
    with pytest.raises(UserError, match="give a value of type int"):
        flags.set_key(config, "seed", True)


def outside(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **options
    )


def test_help_and_errors_come_without_jax():
    code = (
        "import sys; from infer.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code + 10 * ('jax' in sys.modules))"
    )
    done = outside("-c", code, "--help")
    assert done.returncode == 0 and "--rerun" in done.stdout and "denoising_step_list" in done.stdout
    assert "rollout.mode" in done.stdout and "5: a cat sits; 10: a cat runs" in done.stdout
    # Processor time: the clock on the wall depends on what else the machine does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert outside("-m", "infer", "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert outside("-c", code, "--config.heigth=3").returncode == 2


def test_interrupting_ends_quietly_and_leaves_nothing(base: pathlib.Path, working_folder: pathlib.Path):
    arguments = keys(base, num_inference_steps=1000, prompt="a red circle", compilation_cache="")
    process = subprocess.Popen(
        [sys.executable, "-m", "infer", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "1000 steps" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err and not out
    assert not list(working_folder.iterdir())


def test_what_cannot_be_written_or_read_is_said_before_any_weights_are_loaded(
    checkpoint: pathlib.Path,
    working_folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("infer.start._set_up_jax", lambda cache: pytest.fail("the work began"))
    for name, shape in (("noise", (16, 1, 6, 4)), ("text", (5, 25))):
        with SafetensorsWriter(f"{name}.safetensors", {name: (shape, np.float32)}) as writer:
            writer.write(name, np.zeros(shape, np.float32))
    cases = {
        "output": ("/proc/videos/v.mp4", "config.output: /proc/videos cannot be written to"),
        "save_latents": ("/proc/latents.safetensors", "config.save_latents: /proc cannot be written to"),
        "initial_noise": ("noise.safetensors", "this request needs [16, 1, 4, 6]"),
        "text_embeddings": ("text.safetensors", "this model takes [L, 24]"),
    }
    for name, (value, message) in cases.items():
        assert run(*keys(checkpoint, num_frames=1, prompt="a", **{name: value})) == 2
        assert message in capsys.readouterr().err
    damaged = pathlib.Path(shutil.copytree(checkpoint, "damaged"))
    os.truncate(damaged / "vae.safetensors", (damaged / "vae.safetensors").stat().st_size - 9)
    assert run(*keys(damaged, prompt="a")) == 2
    assert "vae.safetensors': it is truncated" in capsys.readouterr().err
    assert run("--config=configs/shapes/vae.py") == 2
    assert "no inference config" in capsys.readouterr().err
    assert run(*keys(checkpoint, save_latents=working_folder), "--overwrite") == 2
    assert "a folder; give a .safetensors file" in capsys.readouterr().err
    assert not (working_folder / "outputs").exists()


def test_a_key_of_a_key_is_explained(capsys: pytest.CaptureFixture[str]):
    assert run("--config.checkpoint.path=x") == 2
    assert "config.checkpoint is one value without keys; write --config.checkpoint=VALUE" in capsys.readouterr().err


def test_a_warning_is_given_once(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert run(*keys(checkpoint, num_frames=1, prompt="")) == 0
    assert capsys.readouterr().err.count("prompt is empty") == 1


def test_rerun_takes_no_harm_from_foreign_metadata(checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    values = {"config": {"checkpoint": str(checkpoint), "height": 33}, "inputs": [1]}
    write_video("v.mp4", np.zeros((1, 32, 32, 3), np.uint8), 16, values)
    assert run("--rerun=v.mp4") == 2
    assert "height is 33" in capsys.readouterr().err
    assert run("--rerun=v.mp4", "--config.height=32", "--config.num_frames=1") == 0
