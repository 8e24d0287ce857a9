"""The source of a distillation that its config names."""

import pathlib
from collections.abc import Sequence
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError

from ..shapes.source import shapes_source
from .images import ImageCache
from .lmdb_file import open_latents
from .prompts import PromptCache, read_prompts
from .sources import SHAPES, Source, encode


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


def _prompts(name: str, checkpoint: NativeCheckpoint, directory: pathlib.Path) -> PromptCache:
    if pathlib.Path(name, "index.json").exists():
        cache = PromptCache.open(name)
        cache.require(checkpoint)
        return cache
    texts, _ = read_prompts(name)
    return encode(directory / "prompts", texts, checkpoint)


def _given(config: Any, field: str, what: str) -> str:
    if not config.get(field):
        raise UserError(f"config.data.{field} is not set, and {what} needs it; `{shipped.command('prepare')}` makes it")
    return config[field]
