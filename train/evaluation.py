"""Looks at a student while it is trained: the same prompts and seeds every time."""

import pathlib
from typing import Any, Protocol

import einops
import jax
import numpy as np

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.media.pixels import to_uint8
from x2v_jax.media.video import write_png, write_video
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import Params

from .data.sources import Conditions, Source, encode
from .shapes import world
from .shapes.judge import score
from .shapes.source import FirstFrameConditions, encode_frames
from .shapes.world import first_frames as real_first_frames

_AT_ONCE = 24
_SHOWN = 12


class Student(Protocol):
    """What is looked at: a distillation task, as far as looking needs it."""

    config: Any
    teacher: NativeCheckpoint
    model_config: WanConfig

    @property
    def on_shapes(self) -> bool: ...
    @property
    def source(self) -> Source: ...
    def sample(self, params: Params, conditions: Conditions, keys: jax.Array) -> jax.Array: ...
    @property
    def decode(self) -> Any: ...


def evaluate_students(task: Student, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
    """Videos of config.evaluation as mp4 and PNG in `directory`/samples, and on Moving Shapes their scores."""
    settings = task.config.evaluation
    prompts = world.heldout_prompts(settings.prompts, seed=1) if task.on_shapes else None
    conditions, first_frames = _conditions(task, prompts, directory)
    count = len(conditions.text)
    parts = []
    for i in range(0, count, _AT_ONCE):
        rows = np.minimum(np.arange(i, i + min(_AT_ONCE, count)), count - 1)
        keys = jax.vmap(jax.random.key)(rows.astype(np.uint32))
        latents = task.sample(params, jax.tree.map(lambda x, rows=rows: x[rows], conditions), keys)
        parts.append(np.asarray(task.decode(latents))[: count - i])
    videos = np.concatenate(parts)
    save_grid(directory / "samples" / f"{step:06d}.png", videos[:_SHOWN])
    frames = to_uint8(videos[:_SHOWN])
    write_video(directory / "samples" / f"{step:06d}.mp4", _tiled(frames), task.teacher.schedule.fps)
    return {} if prompts is None else shapes_scores(videos, prompts, first_frames)


def shapes_scores(videos: np.ndarray, prompts: Any, first_frames: np.ndarray | None) -> dict[str, float]:
    """The judge's means, and how near the videos begin to the frames that they were given, in decibels.

    Args:
        videos: [N, F, H, W, 3] in [-1, 1].
        prompts: what each should show.
        first_frames: uint8 [N, H, W, 3], or None without images.
    """
    results = {k: v for k, v in score(to_uint8(videos), prompts).items() if isinstance(v, float)}
    if first_frames is not None:
        error = np.square(videos[:, 0].astype(np.float64) - (first_frames / 127.5 - 1.0))
        results["first_frame_psnr"] = float(np.mean(10 * np.log10(4.0 / error.mean(axis=(1, 2, 3)))))
    return results


def save_grid(path: pathlib.Path, videos: np.ndarray, every: int = 4) -> None:
    """One row a video, every 4th frame a column. videos: [N, F, H, W, 3] in [-1, 1]."""
    frames = to_uint8(np.asarray(videos))[:, ::every]
    write_png(path, einops.rearrange(frames, "n f h w c -> (n h) (f w) c"))


def _conditions(task: Student, prompts: Any, directory: pathlib.Path) -> tuple[Conditions, np.ndarray | None]:
    if prompts is None:
        # Images come with the prompts that they were prepared with.
        rows = range(min(task.config.evaluation.prompts, len(task.source)))
        return task.source.conditions(rows), None
    cache = encode(directory / "evaluation_prompts", [p.text for p in prompts], task.teacher)
    text = cache.embeddings(range(len(prompts)))
    if task.model_config.model_type != "i2v":
        return Conditions(text), None
    frames = real_first_frames(prompts, seed=1)
    images = FirstFrameConditions(directory, encode_frames(task.teacher, frames), task.teacher)
    rows = np.arange(len(prompts))
    return Conditions(text, images.conditions(rows), images.features(rows)), frames


def _tiled(frames: np.ndarray) -> np.ndarray:
    """Videos [N, F, H, W, 3] side by side in one, [F, rows H, columns W, 3]; missing ones are black."""
    columns = int(np.ceil(np.sqrt(len(frames))))
    rows = -(-len(frames) // columns)
    full = np.zeros((rows * columns, *frames.shape[1:]), np.uint8)
    full[: len(frames)] = frames
    return einops.rearrange(full, "(rows columns) f h w c -> f (rows h) (columns w) c", rows=rows)
