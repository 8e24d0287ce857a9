"""A picture -> what image-to-video conditions on, with the networks that read it."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from x2v_jax.diffusion import image_condition
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.programs import Program
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.models import functional
from x2v_jax.models.config import ClipConfig


class ImageConditioner:
    """CLIP's visual tower and the VAE's encoder at work on one picture at a time.

    Args:
        clip: the image encoder.
        vae: encodes the first frame.
    """

    def __init__(self, clip: Network[ClipConfig], vae: VaeRunner):
        self.clip = clip
        self.vae = vae
        self._encode = clip.jit(lambda tower, pixels: tower(pixels))
        self._condition = jax.jit(self._condition_fn, static_argnames="frames")

    def __call__(
        self, picture: UInt8[np.ndarray, "H W 3"], size: tuple[int, int, int], clock: Clock
    ) -> tuple[Float[Array, "1 n d"], Float[Array, "1 f h w c"]]:
        """CLIP's features, and the mask with the encoded picture. The networks are loaded, and stay.

        Args:
            picture: of any size.
            size: frames, height and width of the video in pixels.
            clock: takes the time of "load" and "image".
        """
        frames, height, width = size
        with clock("load"):
            clip, vae = self.clip.load(), self.vae.network.load()
        with clock("image"):
            pixels = image_condition.clip_pixels(picture, self.clip.config.image_size)
            first = image_condition.resize_bicubic(picture, height, width)
            features = self._encode(clip, pixels[None])
            latents = self._condition(vae, first[None, None], frames=frames)
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
