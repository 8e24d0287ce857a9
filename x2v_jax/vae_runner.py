"""The VAE at work: videos and latents in and out, whole or in pieces as memory allows."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from x2v_jax import memory
from x2v_jax.models import functional
from x2v_jax.models.vae_tiling import decode_in_chunks, decode_tiled
from x2v_jax.networks import Network
from x2v_jax.pixels import to_uint8

DecodeMethod = Literal["auto", "whole", "stream", "tiled"]


class VaeRunner:
    """Encodes and decodes one video at a time with the weights of `network`.

    Args:
        network: the VAE.
        method: "whole" is one program; "stream" decodes one latent frame after the other, with the same result; "tiled"
            also cuts the picture into overlapping tiles that are blended, which changes it slightly; "auto" is whole
            where that takes little memory, else stream, and tiled only where the device could not hold that.
    """

    def __init__(self, network: Network, method: DecodeMethod = "auto"):
        self.network = network
        self.method = method
        self._decode = jax.jit(lambda params, latents: to_uint8(self._merge(params).decode(latents)))
        self._decode_chunk = jax.jit(self._chunk(to_uint8), donate_argnums=(2,))
        self._decode_chunk_float = jax.jit(self._chunk(lambda video: video), donate_argnums=(2,))
        self._latent_frame = jax.jit(lambda latents, i: jax.lax.dynamic_slice_in_dim(latents, i, 1, axis=1))
        self._encode = jax.jit(lambda params, video: self._merge(params).encode(video))
        self._encode_chunk = jax.jit(
            lambda params, video, cache: self._merge(params).encode_chunk(video, cache), donate_argnums=(2,)
        )

    def decode(self, latents: Float[Array, "1 f h w c"]) -> UInt8[np.ndarray, "F H W 3"]:
        """Latents -> frames."""
        method = self.method
        if method == "auto":
            method = memory.decode_method(self.network.config, latents.shape[1:4], memory.device_bytes_free())
        params = self.network.load()
        if method == "whole":
            return np.asarray(self._decode(params, latents))[0]
        if method == "stream":
            pieces = decode_in_chunks(lambda z, cache: self._decode_chunk(params, z, cache), latents)  # type: ignore[arg-type]
            return np.concatenate(list(pieces), axis=1)[0]

        def decode_tile(tile: Any) -> np.ndarray:
            pieces = decode_in_chunks(lambda z, cache: self._decode_chunk_float(params, z, cache), tile)
            return np.concatenate(list(pieces), axis=1)

        video = decode_tiled(decode_tile, np.asarray(latents), stride=self.network.config.spatial_stride)
        return to_uint8(video)[0]

    def encode(self, video: Float[Array | np.ndarray, "1 F H W 3"]) -> Float[Array, "1 f h w c"]:
        """Video in [-1, 1] -> normalised latents. A NumPy video goes to the device in the pieces that are encoded."""
        params, config = self.network.load(), self.network.config
        stride = config.temporal_stride
        _, frames, height, width, _ = video.shape
        latents_size = ((frames - 1) // stride + 1, height // config.spatial_stride, width // config.spatial_stride)
        if memory.encode_method(config, latents_size) == "whole":
            return self._encode(params, video)
        first, cache = self._encode_chunk(params, video[:, :1], None)
        pieces = [first]
        for start in range(1, video.shape[1], stride):
            latents, cache = self._encode_chunk(params, video[:, start : start + stride], cache)
            pieces.append(latents)
        return jnp.concatenate(pieces, axis=1)

    def stream(self, latent_size: tuple[int, int]) -> "StreamDecoder":
        """A decoder for latents of so many rows and columns that come bit by bit. "whole" is then "stream"."""
        config, free = self.network.config, memory.device_bytes_free()
        lacking = free is not None and memory.decode_bytes(config, (2, *latent_size), "stream") > free
        return StreamDecoder(self, tiled=self.method == "tiled" or (self.method == "auto" and lacking))

    def _merge(self, params: functional.Params) -> Any:
        return functional.merge(self.network.graphdef, params)

    def _chunk(self, finish: Callable[[Array], Array]) -> Callable[..., tuple[Array, Any]]:
        def decode_chunk(params: functional.Params, latents: Array, cache: Any) -> tuple[Array, Any]:
            video, cache = self._merge(params).decode_chunk(latents, cache)
            return finish(video), cache

        return decode_chunk


class StreamDecoder:
    """Decodes a video whose latents come bit by bit, as if they had come at once. From `VaeRunner.stream`.

    It holds the convolutions' last frames and nothing else, however long the video.
    """

    def __init__(self, runner: VaeRunner, *, tiled: bool):
        self._runner = runner
        self._params = runner.network.load()
        self._tiled = tiled
        # One for the whole picture, or one for each tile.
        self._caches: list[Any] = [None]

    def __call__(self, latents: Float[Array, "1 f h w c"]) -> list[UInt8[Array | np.ndarray, "1 _ H W 3"]]:
        """The next latent frames -> their frames, in pieces: one frame for the video's first, else four, of each.

        Pieces on the device may still be in the making.
        """
        # One latent frame at a time: two programs serve blocks of any length.
        decode = self._decode_tiled if self._tiled else self._decode
        return [decode(self._runner._latent_frame(latents, np.int32(i))) for i in range(latents.shape[1])]

    def _decode(self, latents: Array) -> Array:
        frames, self._caches[0] = self._runner._decode_chunk(self._params, latents, self._caches[0])
        return frames

    def _decode_tiled(self, latents: Array) -> np.ndarray:
        before, after = iter(self._caches), []

        def decode_tile(tile: Any) -> Any:
            video, cache = self._runner._decode_chunk_float(self._params, tile, next(before, None))
            after.append(cache)
            return video

        stride = self._runner.network.config.spatial_stride
        frames = to_uint8(decode_tiled(decode_tile, np.asarray(latents), stride=stride))
        self._caches = after
        return frames
