"""A picture -> what image-to-video conditions on, with the networks that read it."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from x2v_jax.diffusion import image_condition
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.programs import Program
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.media.image import load_image
from x2v_jax.models import functional


class ImageConditioner:
    """CLIP's visual tower and the VAE's encoder at work on one picture at a time.

    Args:
        clip: the image encoder.
        vae: encodes the first frame.
        patch_size: frames, height and width of a token in latent pixels, of the transformer.
    """

    def __init__(self, clip: Network, vae: VaeRunner, patch_size: tuple[int, int, int]):
        self.clip = clip
        self.vae = vae
        self._patch_size = patch_size
        self._encode = clip.jit(lambda tower, pixels: tower(pixels))
        self._condition = jax.jit(self._condition_fn, static_argnames="frames")
        self._last: tuple[tuple[str, int], np.ndarray] | None = None

    def latent_size(self, source: Any, max_area: int) -> tuple[int, int]:
        """Height and width in latent pixels of the video made from a picture; see `image_condition.latent_size`.

        Raises:
            UserError: the picture cannot be read, or is too long for the area.
        """
        height, width, _ = self._load(source).shape
        stride = self.vae.network.config.spatial_stride
        return image_condition.latent_size(height, width, max_area, spatial_stride=stride, patch_size=self._patch_size)

    def __call__(
        self, source: Any, size: tuple[int, int, int], clock: Clock
    ) -> tuple[Float[Array, "1 n d"], Float[Array, "1 f h w c"]]:
        """CLIP's features, and the mask with the encoded picture. The networks are loaded, and stay.

        Args:
            source: as `image.load_image` takes it.
            size: frames, height and width of the video in pixels.
            clock: takes the time of "load" and "image".
        """
        image = self._load(source)
        frames, height, width = size
        with clock("load"):
            clip, vae = self.clip.load(), self.vae.network.load()
        with clock("image"):
            pixels = image_condition.clip_pixels(image, self.clip.config.image_size)
            picture = image_condition.resize_bicubic(image, height, width)
            features = self._encode(clip, pixels[None])
            latents = self._condition(vae, picture[None, None], frames=frames)
            return features, jax.block_until_ready(latents)

    def programs(self, size: tuple[int, int, int]) -> Iterator[Program]:
        """What a call compiles for a video of so many frames, rows and columns of pixels."""
        frames, height, width = size
        side = self.clip.config.image_size
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        picture = jax.ShapeDtypeStruct((1, 1, height, width, 3), np.float32)
        yield Program("image encoder", self._encode, (self.clip.shapes, pixels))
        arguments = (self.vae.network.shapes, picture)
        yield Program("VAE encoder", self._condition, arguments, {"frames": frames})

    def _condition_fn(self, params: functional.Params, picture: Array, frames: int) -> Array:
        latents = self.vae.still(params, picture, frames)
        return image_condition.image_condition(latents, self.vae.network.config.temporal_stride)

    def _load(self, source: Any) -> UInt8[np.ndarray, "h w 3"]:
        """The last file is remembered, because size, condition and CLIP each ask for it. Arrays may change in place."""
        if not isinstance(source, str | os.PathLike) or not os.path.exists(source):
            return load_image(source)
        key = (str(os.fspath(source)), os.stat(source).st_mtime_ns)
        if self._last is None or self._last[0] != key:
            self._last = (key, load_image(source))
        return self._last[1]
