"""What `python -m infer` does, from the arguments to the files. jax is imported only when all arguments are good."""

import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from x2v_jax import shipped
from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.config import flags
from x2v_jax.config.inference import KEYS

from . import outputs, start
from .record import stream_video
from .settings import Job, Settings, read_settings

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline

DEFAULT_CONFIG = "configs/shapes/t2v.py"
OPTIONS = {
    "config": flags.Option(f"settings to start from [{DEFAULT_CONFIG}]", "FILE.py[:ARGUMENT]"),
    "rerun": flags.Option("repeat a video with the settings that it, or the JSON beside it, carries", "FILE.mp4"),
    "warmup": flags.Option("compile what the video needs, for the next start, and make none"),
    "overwrite": flags.Option("replace existing files (the same as --config.overwrite=true)"),
}
# Prompts that are encoded ahead, so that the text encoder is loaded once for so many videos.
_PROMPTS_AT_ONCE = 256
_CHECKPOINT = f"--config.checkpoint=FOLDER (made by `{shipped.command('convert')}`)"
# What Wan2.1's and LightX2V's own programs call things.
_OTHER_NAMES = {
    "model_path": _CHECKPOINT,
    "ckpt_dir": _CHECKPOINT,
    "config_json": "--config=FILE.json",
    "model_cls": "--config=configs/distill/… or configs/base/…",
    "image_path": "--config.image=FILE",
    "save_video_path": "--config.output=FILE.mp4",
    "save_file": "--config.output=FILE.mp4",
    "size": "--config.height=… --config.width=…",
    "frame_num": "--config.num_frames=…",
    "base_seed": "--config.seed=…",
    "sample_steps": "--config.num_inference_steps=…",
    "sample_shift": "--config.shift=…",
    "sample_guide_scale": "--config.guidance_scale=…",
    "lora_path": "--config.lora=FILE",
}
_INFER = shipped.command("infer")
_USAGE = f"""{_INFER}: makes videos from prompts and images

  {_INFER:<64}the tiny model that ships with the project
  {_INFER} --config.prompt="a blue square moves up"
  {_INFER} --config=configs/distill/wan_t2v_4step.py --config.checkpoint=FOLDER --config.prompt="…"
  {_INFER} --config=LIGHTX2V.json --config.checkpoint=FOLDER
  {_INFER} --config=configs/shapes/t2v_causal.py --config.seconds=20
  {_INFER} --config=configs/self_forcing/wan_t2v_self_forcing.py --config.endless=true --config.prompt="…"
  {_INFER} --rerun outputs/FILE.mp4 --config.seed=7
  {_INFER} --warmup --config=configs/distill/wan_t2v_4step.py --config.compiled_programs=FILE

The path of each video is printed when it is written; its settings are in the file and in a .json beside it.
Causal checkpoints write their video block by block to a file that can be watched while it grows. Ctrl-C ends it: what
is there is kept, and the exit code is 130."""


def help_text() -> str:
    return flags.help_text(_USAGE, OPTIONS, KEYS, DEFAULT_CONFIG)


_finished: list[pathlib.Path] = []  # the videos of this run


def kept() -> str:
    """What to say of the videos of a run that was interrupted."""
    if not _finished:
        return "no video was finished"
    return f"{len(_finished)} finished video{'s are' if len(_finished) > 1 else ' is'} kept"


def run(arguments: Sequence[str]) -> None:
    """Makes the videos that the arguments ask for, and prints their paths.

    Raises:
        UserError: a mistake in the arguments, found before any weights are loaded where that is possible.
        HelpAsked: --help is among them.
    """
    _plain_warnings()
    _finished.clear()
    options = {name: option for name, option in OPTIONS.items() if name != "config"}
    with Interrupts() as interrupts:
        line = flags.parse(arguments, default_config=DEFAULT_CONFIG, options=options, other_names=_OTHER_NAMES)
        settings = read_settings(line)
        (start.warm_up if line.options.get("warmup") else _generate)(settings, interrupts)


def _generate(settings: Settings, interrupts: Interrupts) -> None:
    begin = time.perf_counter()
    if settings.skipped:
        total = len(settings.jobs) + settings.skipped
        print(f"{settings.skipped} of {total} videos are there and are skipped", file=sys.stderr)
    if not settings.jobs:
        return
    pipeline = start.make_pipeline(settings)
    start.take_programs(pipeline, settings)
    start.announce(pipeline, settings)
    seconds = {"imports": time.perf_counter() - begin}
    is_causal = settings.checkpoint.schedule.causal is not None
    predicted = 0
    for number, job in enumerate(settings.jobs, 1):
        if len(settings.jobs) > 1 and number % _PROMPTS_AT_ONCE == 1:
            ahead = settings.jobs[number - 1 :][:_PROMPTS_AT_ONCE]
            seconds["text"] = seconds.get("text", 0.0) + pipeline.prepare([each.request for each in ahead])
        label = f"{number}/{len(settings.jobs)} " if len(settings.jobs) > 1 else ""
        predicted = max(predicted, pipeline.plan(job.request).peak)
        if is_causal:
            path, taken = stream_video(pipeline, settings, job, f"{label}streaming", interrupts)
        else:
            path, taken = _one_video(pipeline, settings, job, label)
        for name, value in taken.items():
            seconds[name] = seconds.get(name, 0.0) + value
        _finished.append(path)
        print(path, flush=True)
    _summarize(len(settings.jobs), seconds, time.perf_counter() - begin, predicted)


def _one_video(pipeline: "Pipeline", settings: Settings, job: Job, label: str) -> tuple[pathlib.Path, dict[str, float]]:
    from x2v_jax.generate.progress import shown

    with shown(settings.config.progress, label) as display:
        result = pipeline.generate(job.request, progress=display or False)
        before = time.perf_counter()
        if display is not None:
            display.begin("writing the file")
        path = outputs.write(settings, job, result.frames)
    return path, result.seconds | {"file": time.perf_counter() - before}


def _summarize(videos: int, seconds: dict[str, float], total: float, predicted: int) -> None:
    from x2v_jax.memory import device

    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    count = f"{videos} videos" if videos > 1 else "1 video"
    print(
        f"{count} in {total:.1f} s ({parts}); peak memory {device.peak_bytes() / 1e9:.2f} GB, "
        f"predicted {predicted / 1e9:.2f} GB",
        file=sys.stderr,
    )


def _plain_warnings() -> None:
    shown = set()  # what holds for all videos of a run is said once

    def show(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
