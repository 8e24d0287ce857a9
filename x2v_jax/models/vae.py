"""Wan2.1's causal 3-D VAE: 4n+1 frames of 8h x 8w pixels <-> n+1 latent frames of h x w, 16 channels.

Time runs one way only, so a video can be coded in chunks: the first frame alone (it becomes a latent frame of its own),
then any number of the rest. A chunk takes the cache the last one left: each causal convolution's last input frames.
Whole coding is the same code with two chunks, which is why the two agree.
"""

import itertools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.lax import broadcast_to_rank
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.models.config import VaeConfig
from x2v_jax.models.vae_blocks import (
    AttentionBlock,
    Cache,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    PointwiseConv,
    ResidualBlock,
    Upsample,
    run_chain,
)

Video = Float[Array, "b _ _ _ 3"]
Latents = Float[Array, "b _ _ _ _"]


class _Head(nnx.Module):
    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, **dtypes: DTypeLike):
        self.norm = ChannelNorm(features, param_dtype=dtypes["param_dtype"])
        self.conv = CausalConv3d(features, out, rngs=rngs, **dtypes)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        return self.conv(nnx.silu(self.norm(x)), cache)


def _middle(features: int, *, rngs: nnx.Rngs, **dtypes: DTypeLike) -> Any:
    return nnx.List(
        [
            ResidualBlock(features, features, rngs=rngs, **dtypes),
            AttentionBlock(features, rngs=rngs, **dtypes),
            ResidualBlock(features, features, rngs=rngs, **dtypes),
        ]
    )


class Encoder(nnx.Module):
    """Video chunk -> mean and log variance of the latents, [B, n, h, w, 2 z_dim]."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, **dtypes: DTypeLike):
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], rngs=rngs, **dtypes)
        layers: list[nnx.Module] = []
        for i, (width, out) in enumerate(itertools.pairwise(widths)):
            for j in range(config.num_res_blocks):
                layers.append(ResidualBlock(width if j == 0 else out, out, rngs=rngs, **dtypes))
            if i < len(config.dim_mult) - 1:
                layers.append(Downsample(out, in_time=config.temporal_downsample[i], rngs=rngs, **dtypes))
        self.downsamples = nnx.List(layers)
        self.middle = _middle(widths[-1], rngs=rngs, **dtypes)
        self.head = _Head(widths[-1], 2 * config.z_dim, rngs=rngs, **dtypes)

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_chain([self.conv1, *self.downsamples, *self.middle, self.head], x, cache)


class Decoder(nnx.Module):
    """Latent chunk -> video chunk (not clamped)."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, **dtypes: DTypeLike):
        mult = config.dim_mult
        widths = [config.dim * m for m in (mult[-1], *reversed(mult))]
        upsample_in_time = tuple(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.z_dim, widths[0], rngs=rngs, **dtypes)
        self.middle = _middle(widths[0], rngs=rngs, **dtypes)
        layers: list[nnx.Module] = []
        for i, (width, out) in enumerate(itertools.pairwise(widths)):
            width = width if i == 0 else width // 2  # the upsampling before this stage halves the channels
            for j in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(width if j == 0 else out, out, rngs=rngs, **dtypes))
            if i < len(mult) - 1:
                layers.append(Upsample(out, in_time=upsample_in_time[i], rngs=rngs, **dtypes))
        self.upsamples = nnx.List(layers)
        self.head = _Head(widths[-1], 3, rngs=rngs, **dtypes)

    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        return run_chain([self.conv1, *self.middle, *self.upsamples, self.head], x, cache)


class WanVae(nnx.Module):
    """The autoencoder with its latent normalisation. Convolutions run in `dtype`, norms in float32."""

    def __init__(
        self,
        config: VaeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        dtypes: dict[str, DTypeLike] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, **dtypes)
        self.conv1 = PointwiseConv(2 * config.z_dim, 2 * config.z_dim, rngs=rngs, **dtypes)
        self.conv2 = PointwiseConv(config.z_dim, config.z_dim, rngs=rngs, **dtypes)
        self.decoder = Decoder(config, rngs=rngs, **dtypes)

    def encode(self, video: Video) -> Latents:
        """Video in [-1, 1] with 4n+1 frames -> normalised mean of the posterior, float32."""
        return self.normalize_latents(self.moments(video)[0])

    def decode(self, latents: Latents) -> Video:
        """Normalised latents -> video, clamped to [-1, 1], float32."""
        first, cache = self.decode_chunk(latents[:, :1])
        if latents.shape[1] == 1:
            return first
        rest, _ = self.decode_chunk(latents[:, 1:], cache)
        return jnp.concatenate([first, rest], axis=1)

    def encode_chunk(self, video: Video, cache: Cache = None) -> tuple[Latents, Cache]:
        """Streaming encode: the first frame alone (cache None), then chunks of a multiple of four frames."""
        (mean, _), cache = self._moments_chunk(video, cache)
        return self.normalize_latents(mean), cache

    def decode_chunk(self, latents: Latents, cache: Cache = None) -> tuple[Video, Cache]:
        """Streaming decode: the first latent frame alone (cache None) gives one frame, each later one gives four."""
        if cache is None and latents.shape[1] != 1:
            raise ValueError(f"the first chunk holds one latent frame, got {latents.shape[1]}")
        video, cache = self.decoder(self.conv2(self.denormalize_latents(latents)), cache)
        return jnp.clip(video.astype(jnp.float32), -1.0, 1.0), cache

    def moments(self, video: Video) -> tuple[Latents, Latents]:
        """Mean and log variance of the posterior, not normalised (for training)."""
        if (video.shape[1] - 1) % self.config.temporal_stride:
            raise ValueError(f"a video has {self.config.temporal_stride}n+1 frames, got {video.shape[1]}")
        (mean, logvar), cache = self._moments_chunk(video[:, :1], None)
        if video.shape[1] == 1:
            return mean, logvar
        (rest_mean, rest_logvar), _ = self._moments_chunk(video[:, 1:], cache)
        return jnp.concatenate([mean, rest_mean], axis=1), jnp.concatenate([logvar, rest_logvar], axis=1)

    def normalize_latents(self, z: Latents) -> Latents:
        mean, std = self._statistics()
        return (z.astype(jnp.float32) - mean) / std

    def denormalize_latents(self, latents: Latents) -> Latents:
        mean, std = self._statistics()
        return latents.astype(jnp.float32) * std + mean

    def _moments_chunk(self, video: Video, cache: Cache) -> tuple[tuple[Latents, Latents], Cache]:
        hidden, cache = self.encoder(video, cache)
        mean, logvar = jnp.split(self.conv1(hidden).astype(jnp.float32), 2, axis=-1)
        return (mean, logvar), cache

    def _statistics(self) -> tuple[Array, Array]:
        """Mean and standard deviation of each channel, [1, 1, 1, 1, C]."""
        mean, std = (jnp.array(x, jnp.float32) for x in (self.config.latents_mean, self.config.latents_std))
        return broadcast_to_rank(mean, 5), broadcast_to_rank(std, 5)
