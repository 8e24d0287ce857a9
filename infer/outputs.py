"""Where videos go and what they say about themselves."""

import os
import pathlib
from typing import Any

import numpy as np

from x2v_jax import shipped
from x2v_jax.media.video import write_video
from x2v_jax.request import Request

from . import rerun
from .settings import Job, Settings, checkpoint_digest

# Keys that do not belong to the video but to the run or the machine.
_LEFT_OUT = (
    "prompt_file", "num_videos", "output", "overwrite", "save_latents", "compilation_cache", "compiled_programs",
    "memory_limit", "offload", "embed_settings", "existing",
)  # fmt: skip


def metadata(settings: Settings, job: Job) -> dict[str, Any]:
    """What is written beside a video: enough to make it again, and the folder that relative paths start from.

    Nothing in it depends on the time of day.
    """
    import jax

    config = {name: value for name, value in settings.config.to_dict().items() if name not in _LEFT_OUT}
    for name in Request.field_names():
        if name in config:
            config[name] = getattr(job.request.completed, name)
    config["lora"] = settings.loras
    for name in ("checkpoint", "image"):
        config[name] = config[name] and shipped.recorded(str(config[name]))
    named = {str(config[name]) for name in rerun.INPUTS if config[name]} | {path for path, _ in settings.loras}
    inputs = {shipped.recorded(path): digest for path, digest in settings.inputs.items()}
    return {
        "program": "x2v-jax",
        "version": shipped.VERSION,
        "config": config,
        "model_sha256": checkpoint_digest(settings.checkpoint),
        "inputs": {path: digest for path, digest in inputs.items() if path in named},
        "made_with": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "folder": os.getcwd(),
    }


def carried(settings: Settings, values: dict[str, Any]) -> dict[str, Any] | None:
    """What the mp4 itself carries of `values`: no folder of this machine, or nothing at all."""
    if not settings.config.embed_settings:
        return None
    config = dict(values["config"])
    loras = config["lora"]
    keys = [name for name in ("checkpoint", *rerun.INPUTS) if config[name]]
    names = rerun.portable_names(dict.fromkeys([*(str(config[key]) for key in keys), *(path for path, _ in loras)]))
    config |= {key: names[str(config[key])] for key in keys}
    config["lora"] = tuple((names[path], strength) for path, strength in loras)
    inputs = {names[path]: digest for path, digest in values["inputs"].items()}
    return {key: value for key, value in values.items() if key != "folder"} | {"config": config, "inputs": inputs}


def with_size(values: dict[str, Any], frames: int, height: int, width: int) -> dict[str, Any]:
    return values | {"size": {"frames": frames, "height": height, "width": width}}


def place(job: Job, existing: str) -> pathlib.Path:
    """Where a job's video goes: under a name that is free, unless files that are there may be replaced."""
    return free_path(job.path) if existing == "rename" else job.path


def write(settings: Settings, job: Job, frames: np.ndarray) -> pathlib.Path:
    """Writes the video and the JSON beside it, and returns the video's path.

    Raises:
        UserError: the files cannot be written.
    """
    path = place(job, settings.config.existing)
    values = with_size(metadata(settings, job), *frames.shape[:3])
    write_video(path, frames, job.request.fps, carried(settings, values), beside=values)
    return path


def free_path(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the first of NAME-1.mp4, NAME-2.mp4, … of which neither the mp4 nor its JSON exists."""
    number, candidate = 0, path
    while candidate.exists() or candidate.with_suffix(".json").exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
