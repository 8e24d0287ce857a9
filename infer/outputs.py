"""Where videos go and what they say about themselves."""

import pathlib
from typing import Any

import numpy as np

from x2v_jax import shipped
from x2v_jax.media.video import write_video
from x2v_jax.request import Request

from .settings import Job, Settings, checkpoint_digest

# Keys that do not belong to the video but to the run or the machine.
_LEFT_OUT = (
    "prompt_file", "num_videos", "output", "overwrite", "save_latents", "compilation_cache", "compiled_programs",
    "memory_limit", "offload",
)  # fmt: skip


def metadata(settings: Settings, job: Job) -> dict[str, Any]:
    """What a video carries: enough to make it again. Nothing in it depends on the time of day."""
    import jax

    config = {name: value for name, value in settings.config.to_dict().items() if name not in _LEFT_OUT}
    for name in Request.field_names():
        if name in config:
            config[name] = getattr(job.request.completed, name)
    config["lora"] = settings.loras
    for name in ("checkpoint", "image"):
        config[name] = config[name] and shipped.recorded(str(config[name]))
    return {
        "program": "x2v-jax",
        "version": shipped.VERSION,
        "config": config,
        "model_sha256": checkpoint_digest(settings.checkpoint),
        "inputs": {shipped.recorded(path): digest for path, digest in settings.inputs.items()},
        "made_with": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }


def with_size(values: dict[str, Any], frames: int, height: int, width: int) -> dict[str, Any]:
    return values | {"size": {"frames": frames, "height": height, "width": width}}


def place(job: Job, overwrite: bool) -> pathlib.Path:
    """Where a job's mp4 goes: under a name that is free, unless existing files may be replaced."""
    path = job.folder / f"{job.stem}.mp4"
    return path if overwrite else free_path(path)


def write(job: Job, frames: np.ndarray, values: dict[str, Any], overwrite: bool) -> pathlib.Path:
    """Writes the mp4 and the JSON beside it, and returns the mp4's path.

    Raises:
        UserError: the files cannot be written.
    """
    path = place(job, overwrite)
    write_video(path, frames, job.request.fps, with_size(values, *frames.shape[:3]))
    return path


def free_path(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the first of NAME-1.mp4, NAME-2.mp4, … of which neither the mp4 nor its JSON exists."""
    number, candidate = 0, path
    while candidate.exists() or candidate.with_suffix(".json").exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
