"""Where videos go and what they say about themselves."""

import pathlib
from typing import Any

import numpy as np

import x2v_jax
from infer.settings import Job, Settings, checkpoint_digest
from x2v_jax.request import Request
from x2v_jax.video import write_video

# Keys that do not belong to the video but to the run or the machine.
_LEFT_OUT = ("prompt_file", "num_videos", "output", "overwrite", "save_latents", "compilation_cache")


def metadata(work: Settings, job: Job, frames: np.ndarray) -> dict[str, Any]:
    """What a video carries: enough to make it again. Nothing in it depends on the time of day."""
    import jax

    config = {name: value for name, value in work.config.to_dict().items() if name not in _LEFT_OUT}
    for name in Request.field_names():
        if name in config:
            config[name] = getattr(job.request, name)
    config["lora"] = work.loras
    return {
        "program": "x2v-jax",
        "version": x2v_jax.__version__,
        "config": config,
        "model_sha256": checkpoint_digest(work.checkpoint),
        "inputs": work.inputs,
        "size": {"frames": frames.shape[0], "height": frames.shape[1], "width": frames.shape[2]},
        "made_with": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }


def write(job: Job, frames: np.ndarray, values: dict[str, Any], overwrite: bool) -> pathlib.Path:
    """Writes the mp4 and the JSON beside it, and returns the mp4's path.

    Raises:
        UserError: the files cannot be written.
    """
    assert job.request.fps is not None  # resolved
    path = job.folder / f"{job.stem}.mp4"
    if not overwrite:
        path = free_path(path)
    write_video(path, frames, job.request.fps, values)
    return path


def free_path(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the first of NAME-1.mp4, NAME-2.mp4, … of which neither the mp4 nor its JSON exists."""
    number, candidate = 0, path
    while candidate.exists() or candidate.with_suffix(".json").exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
