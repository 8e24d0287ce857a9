"""The VAE at work: videos and latents in and out, whole or in pieces as memory allows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.programs import Program
from x2v_jax.media.pixels import to_uint8
from x2v_jax.memory import activations as vae_memory
from x2v_jax.memory import device
from x2v_jax.models import functional
from x2v_jax.models.config import VaeConfig
from x2v_jax.models.vae import Cache
from x2v_jax.models.vae_pieces import TILE, decode_tiled

DecodeMethod = Literal["auto", "whole", "stream", "tiled"]


class VaeRunner:
    """Encodes and decodes one video at a time with the weights of `network`.

    Args:
        network: the VAE.
        method: "whole" decodes all frames at once; "stream" one latent frame after the other, with the same result;
            "tiled" also cuts the picture into overlapping tiles that are blended, which changes it slightly; "auto" is
            whole where that takes little memory, else stream, and tiled only where the device could not hold that.
            Each is one compiled program.
        available: bytes of the device's memory that there are, where not the device is to say so.
    """

    def __init__(self, network: Network[VaeConfig], method: DecodeMethod = "auto", available: int | None = None):
        self.network = network
        self.method = method
        self._available = available
        self._size = jnp.dtype(network.dtype).itemsize
        self._decode = jax.jit(lambda params, latents: to_uint8(self._merge(params).decode(latents)))
        self._decode_stream = jax.jit(self._in_pieces(to_uint8))
        self._decode_tile = jax.jit(self._in_pieces(lambda video: video))
        self._decode_chunk = jax.jit(self._chunk(to_uint8), donate_argnums=(2,))
        self._decode_chunk_float = jax.jit(self._chunk(lambda video: video), donate_argnums=(2,))
        self._latent_frame = jax.jit(lambda latents, i: jax.lax.dynamic_slice_in_dim(latents, i, 1, axis=1))
        self._encode = jax.jit(lambda params, video: self._merge(params).encode(video))
        self._encode_chunk = jax.jit(
            lambda params, video, cache: self._merge(params).encode_chunk(video, cache), donate_argnums=(2,)
        )
        self._join = jax.jit(lambda pieces: jnp.concatenate(pieces, axis=1))

    def decode(self, latents: Float[Array, "1 f h w c"]) -> UInt8[np.ndarray, "F H W 3"]:
        """Latents -> frames."""
        method = self.decode_method(latents.shape[1:4])
        params = self.network.load()
        if method == "tiled":

            def decode_tile(tile: np.ndarray) -> np.ndarray:
                return np.asarray(self._decode_tile(params, tile))

            stride = self.network.config.spatial_stride
            return to_uint8(decode_tiled(decode_tile, np.asarray(latents), stride=stride))[0]
        return np.asarray((self._decode if method == "whole" else self._decode_stream)(params, latents))[0]

    def timed(self, latents: Float[Array, "1 f h w c"], clock: Clock) -> UInt8[np.ndarray, "F H W 3"]:
        """`decode`, with the time of loading and of decoding apart."""
        with clock("load"):
            self.network.load()
        with clock("vae"):
            return self.decode(latents)

    def decode_method(self, latents: Sequence[int]) -> str:
        """How latents of (frames, height, width) are decoded."""
        if self.method != "auto":
            return self.method
        return vae_memory.decode_method(self.network.config, latents, self._free(), self._size)

    def encode(self, video: Float[Array | np.ndarray, "1 F H W 3"]) -> Float[Array, "1 f h w c"]:
        """Video in [-1, 1] -> normalised latents. A NumPy video goes to the device in the pieces that are encoded."""
        params, config = self.network.load(), self.network.config
        stride = config.temporal_stride
        _, frames, height, width, _ = video.shape
        latents_size = ((frames - 1) // stride + 1, height // config.spatial_stride, width // config.spatial_stride)
        if vae_memory.encode_method(config, latents_size, self._size) == "whole":
            return self._encode(params, video)
        first, cache = self._encode_chunk(params, video[:, :1], None)
        pieces = [first]
        for start in range(1, video.shape[1], stride):
            latents, cache = self._encode_chunk(params, video[:, start : start + stride], cache)
            pieces.append(latents)
        return self._join(pieces)

    def still(self, params: functional.Params, picture: Float[Array, "1 1 H W 3"], frames: int) -> Array:
        """Latents of a video that is a picture and then `frames` - 1 grey (zero) frames. To be called within a program.

        The grey frames exist only in the pieces in which they are encoded.
        """
        vae, stride = self._merge(params), self.network.config.temporal_stride
        first, cache = vae.encode_chunk(picture)
        if frames == 1:
            return first
        grey = jnp.zeros((1, stride, *picture.shape[2:]), picture.dtype)

        def encode(cache: Cache, _: None) -> tuple[Cache, Array]:
            latents, cache = vae.encode_chunk(grey, cache)
            return cache, latents

        _, rest = jax.lax.scan(encode, cache, None, length=(frames - 1) // stride)
        return jnp.concatenate([first, _joined(rest)], axis=1)

    def stream(self, latent_size: tuple[int, int]) -> "StreamDecoder":
        """A decoder for latents of so many rows and columns that come bit by bit. "whole" is then "stream"."""
        return StreamDecoder(self, tiled=self._streams_tiled(latent_size))

    def programs(self, latents: tuple[int, ...]) -> Iterator[Program]:
        """What `decode` compiles for latents of a shape [1, f, h, w, C]."""
        method = self.decode_method(latents[1:4])
        if method == "tiled":
            latents = (*latents[:2], min(latents[2], TILE), min(latents[3], TILE), latents[4])
        function = {"whole": self._decode, "stream": self._decode_stream, "tiled": self._decode_tile}[method]
        yield Program(f"VAE decoder, {method}", function, (self.network.shapes, _float32(latents)))

    def stream_programs(self, latents: tuple[int, ...]) -> Iterator[Program]:
        """What `StreamDecoder` compiles for blocks of latents of shapes [1, f, h, w, C]."""
        params, tiled = self.network.shapes, self._streams_tiled(latents[2:4])
        frame = (1, 1, *latents[2:])
        if tiled:
            frame = (1, 1, min(latents[2], TILE), min(latents[3], TILE), latents[4])
        decode = self._decode_chunk_float if tiled else self._decode_chunk
        _, cache = jax.eval_shape(decode, params, _float32(frame), None)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        yield Program("latent frame", self._latent_frame, (_float32(latents), number))
        yield Program("VAE decoder, first frame", decode, (params, _float32(frame), None))
        yield Program("VAE decoder, later frames", decode, (params, _float32(frame), cache))

    def _streams_tiled(self, latent_size: Sequence[int]) -> bool:
        free = self._free()
        needed = vae_memory.decode_bytes(self.network.config, (2, *latent_size), "stream", self._size)
        return self.method == "tiled" or (self.method == "auto" and free is not None and needed > free)

    def _free(self) -> int | None:
        free = device.device_bytes_free()
        return free if self._available is None or (free is not None and free < self._available) else self._available

    def _merge(self, params: functional.Params) -> Any:
        return functional.merge(self.network.graphdef, params)

    def _in_pieces(self, finish: Callable[[Array], Array]) -> Callable[..., Array]:
        """One program for any number of latent frames: the first alone, then one after the other."""

        def decode(params: functional.Params, latents: Array) -> Array:
            vae = self._merge(params)
            first, cache = vae.decode_chunk(latents[:, :1])
            if latents.shape[1] == 1:
                return finish(first)

            def decode_frame(cache: Cache, frame: Array) -> tuple[Cache, Array]:
                video, cache = vae.decode_chunk(frame[:, None], cache)
                return cache, finish(video)

            _, rest = jax.lax.scan(decode_frame, cache, jnp.moveaxis(latents[:, 1:], 1, 0))
            return jnp.concatenate([finish(first), _joined(rest)], axis=1)

        return decode

    def _chunk(self, finish: Callable[[Array], Array]) -> Callable[..., tuple[Array, Cache]]:
        def decode_chunk(params: functional.Params, latents: Array, cache: Cache) -> tuple[Array, Cache]:
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
        self._caches: list[Cache] = [None]

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

        def decode_tile(tile: object) -> Any:
            video, cache = self._runner._decode_chunk_float(self._params, tile, next(before, None))
            after.append(cache)
            return video

        stride = self._runner.network.config.spatial_stride
        frames = to_uint8(decode_tiled(decode_tile, np.asarray(latents), stride=stride))
        self._caches = after
        return frames


def _joined(pieces: Num[Array, "n 1 f h w c"]) -> Num[Array, "1 m h w c"]:
    """What a scan stacked, one after the other in time."""
    return einops.rearrange(pieces, "n b f h w c -> b (n f) h w c")


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
