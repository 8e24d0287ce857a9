"""What distillation learns from: prompts, and where a trainer needs them first frames or encoded videos, by row.

A source is text only, images with captions, or videos with captions. Each comes from caches that `python -m
train.prepare` made, or is drawn from Moving Shapes ("shapes"), which needs no files.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError

from .order import epoch_rows
from .prompts import PromptCache, make_prompt_cache

SHAPES = "shapes"


class Conditions(NamedTuple):
    """What a video is made from. text: [B, L, D]; image_latents: mask and encoded first frame, [B, f, h, w, 4 + C];
    image_features: of CLIP, [B, N, D]."""

    text: Any
    image_latents: Any = None
    image_features: Any = None


class Batch(NamedTuple):
    """What a rollout is made from.

    conditions: of each video. sample: its number in the batch, which its noise is drawn by. latents: real videos,
    [B, f, h, w, C]. given: frames that a causal student goes on from, [B, g, h, w, C]. last_image: the last picture of
    `given`, encoded alone, [B, h, w, C]. following: what comes after the video that is made from all this, in turn with
    `conditions`, where the student is to go on from its own frames. own: after so many videos of its own, [B], all one
    number.
    """

    conditions: Conditions
    sample: Any
    latents: Any = None
    given: Any = None
    last_image: Any = None
    following: Conditions | None = None
    own: Any = None


class Source:
    """Rows of conditions, in an order that seed and step decide.

    Args:
        prompts: the embeddings, row for row with images and latents.
        images: conditions(rows) and features(rows), for image-to-video.
        latents: latents(rows), of real videos.
    """

    def __init__(self, prompts: PromptCache, *, images: Any = None, latents: Any = None):
        for other in (images, latents):
            if other is not None and len(other) != len(prompts):
                raise UserError(f"{other.path} has {len(other)} rows and its prompts {prompts.path} {len(prompts)}")
        self.prompts, self.images, self._latents = prompts, images, latents

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def negative(self) -> np.ndarray:
        """[L, D], of the negative prompt."""
        return self.prompts.negative

    def conditions(self, rows: Sequence[int] | np.ndarray) -> Conditions:
        text = self.prompts.embeddings(rows)
        if self.images is None:
            return Conditions(text)
        return Conditions(text, self.images.conditions(rows), self.images.features(rows))

    def batch(self, seed: int, step: int, size: int, stream: int = 0) -> Batch:
        """The batch of a step. Streams are drawn independently of each other."""
        rows = epoch_rows(seed, step, size, len(self), stream)
        latents = None if self._latents is None else self._latents.latents(rows)
        return Batch(self.conditions(rows), np.arange(size, dtype=np.int32), latents)


def encode(path: pathlib.Path, prompts: Sequence[str], checkpoint: NativeCheckpoint) -> PromptCache:
    """The embeddings of prompts in a cache at `path`, made if it does not exist."""
    return make_prompt_cache(path, prompts, checkpoint, dtype="float32", compute="float32", batch_size=64)
