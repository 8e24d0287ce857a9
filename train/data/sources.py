"""What distillation learns from: prompts, and where a trainer needs them first frames or encoded videos, by row.

A source is text only, images with captions, or videos with captions. Each comes from caches that `python -m
train.prepare` made, or is drawn from Moving Shapes ("shapes"), which needs no files.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.data.images import ImageCache
from train.data.lmdb_file import open_latents
from train.data.order import epoch_rows
from train.data.prompts import PromptCache, make_prompt_cache, read_prompts
from train.shapes import world
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError

SHAPES = "shapes"
_SCENES_AT_ONCE = 256


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


def open_source(
    config: Any,
    checkpoint: NativeCheckpoint,
    directory: pathlib.Path,
    latent_size: Sequence[int],
    *,
    with_latents: bool,
) -> Source:
    """The source that `config` (config.data of a trainer) names.

    Args:
        config: `prompts`: "shapes", a prompt cache, or a text file of one prompt a line; `images` and `latents`: caches
            whose captions are the prompts; `count`, `seed`: of Moving Shapes.
        checkpoint: gives text encoder, VAE and image encoder.
        directory: of the run; what is encoded now is kept there.
        latent_size: frames, height, width, channels.
        with_latents: whether real videos are needed.

    Raises:
        UserError: data that are missing, or of another size or model.
    """
    with_images = checkpoint.task == "i2v"
    if config.prompts == SHAPES:
        from train.shapes.source import shapes_source

        return shapes_source(config, checkpoint, directory, with_images=with_images, with_latents=with_latents)
    images = latents = None
    if with_images:
        images = ImageCache.open(_given(config, "images", "image-to-video"), latent_size)
        images.require(checkpoint)
        captions = images.captions
    if with_latents:
        latents = open_latents(_given(config, "latents", "this trainer"), latent_size)
        latents.require(checkpoint)
        captions = latents.captions
    if images is None and latents is None:
        return Source(_prompts(str(_given(config, "prompts", "distillation")), checkpoint, directory))
    return Source(encode(directory / "prompts", captions, checkpoint), images=images, latents=latents)


def encode(path: pathlib.Path, prompts: Sequence[str], checkpoint: NativeCheckpoint) -> PromptCache:
    """The embeddings of prompts in a cache at `path`, made if it does not exist."""
    return make_prompt_cache(path, prompts, checkpoint, dtype="float32", compute="float32", batch_size=64)


def shapes_prompts(count: int, seed: int) -> list[str]:
    """Training captions of `count` scenes; none of them is held out."""
    texts: list[str] = []
    for i in range(0, count, _SCENES_AT_ONCE):
        scenes = world.sample_scenes(jax.random.fold_in(jax.random.key(seed), i), _SCENES_AT_ONCE)
        texts += world.captions(scenes, seed=seed + i)
    return texts[:count]


def _prompts(name: str, checkpoint: NativeCheckpoint, directory: pathlib.Path) -> PromptCache:
    if pathlib.Path(name, "index.json").exists():
        cache = PromptCache.open(name)
        cache.require(checkpoint)
        return cache
    texts, _ = read_prompts(name)
    return encode(directory / "prompts", texts, checkpoint)


def _given(config: Any, field: str, what: str) -> str:
    if not config.get(field):
        raise UserError(f"config.data.{field} is not set, and {what} needs it; `python -m train.prepare` makes it")
    return config[field]
