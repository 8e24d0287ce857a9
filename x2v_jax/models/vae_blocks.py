"""Building blocks of the VAE. Every block maps (x [B, F, H, W, C], cache) to (x, cache); cache None = first frame."""

from collections.abc import Callable, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import broadcast_to_rank
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from x2v_jax.ops.attention import attention

Frames = Float[Array, "b _ _ _ _"]
# Nested tuples of the last inputs of what looks back in time; None before the first frame.
Cache = PyTree[Array]


def run_chain(blocks: Sequence[Any], x: Frames, cache: Cache) -> tuple[Frames, Cache]:
    """Runs blocks in order, each with its own part of the cache."""
    caches = [None] * len(blocks) if cache is None else cache
    left = []
    for block, block_cache in zip(blocks, caches, strict=True):
        x, block_cache = block(x, block_cache)
        left.append(block_cache)
    return x, tuple(left)


class ChannelNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over channels, in float32 (torch's F.normalize, scaled)."""

    def __init__(self, features: int, *, param_dtype: DTypeLike):
        self.gamma = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: Frames) -> Frames:
        x32 = x.astype(jnp.float32)
        # rsqrt of the sum, bounded so that the gradient at x = 0 is finite; 1e-24 is the square of torch's eps.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), 1e-24))
        gamma = x.shape[-1] ** 0.5 * self.gamma[...].astype(jnp.float32)
        return (x32 * inverse * broadcast_to_rank(gamma, x.ndim)).astype(x.dtype)


def conv2d(x: Array, kernel: Array, *, stride: int = 1, padding: str | Sequence[tuple[int, int]] = "SAME") -> Array:
    """[N, H, W, I] * [kh, kw, I, O] -> [N, H', W', O]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _per_frame(function: Callable[[Array], Array], x: Frames) -> Frames:
    b, f = x.shape[:2]
    y = function(x.reshape(b * f, *x.shape[2:]))
    return y.reshape(b, f, *y.shape[1:])


def conv3d_valid_in_time(before: Frames, x: Frames, kernel: Array) -> Frames:
    """3x3x3 convolution of frames that follow two others, padded in space only: F frames in, F out.

    As one 2-D convolution of three frames side by side on channels. XLA's 3-D convolution on CPU runs at a third of the
    speed of that; on GPUs it wants channels first, and so transposes all that goes in and comes out.
    """
    taps = kernel.shape[0]
    frames = x.shape[1]
    shifted = [
        # Said so that it is one copy: slices of the frames joined on time would be two.
        jnp.concatenate([before[:, t : t + frames], x[:, : max(0, frames - taps + 1 + t)]], axis=1)
        for t in range(taps)
    ]
    flat_kernel = einops.rearrange(kernel, "taps kh kw i o -> kh kw (taps i) o")
    return _per_frame(lambda images: conv2d(images, flat_kernel), jnp.concatenate(shifted, axis=-1))


class CausalConv3d(nnx.Module):
    """3x3x3 convolution that sees the present and two past frames. kernel: [3, 3, 3, I, O]. Cache: last two inputs."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 3, features, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Frames, cache: Array | None) -> tuple[Frames, Array]:
        x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        if cache is None:
            # One frame after zeros: only the present tap matters.
            y = _per_frame(lambda images: conv2d(images, kernel[2]), x)
            cache = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
        else:
            y = conv3d_valid_in_time(cache, x, kernel)
            cache = jnp.concatenate([cache, x], axis=1)[:, -2:] if x.shape[1] < 2 else x[:, -2:]
        return y + broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim), cache


class TimeConv(nnx.Module):
    """Convolution over three frames at each pixel. kernel: [3, I, O]; F frames in, (F - 3) // stride + 1 out."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (3, features, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Frames, *, stride: int = 1) -> Frames:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        frames = (x.shape[1] - 3) // stride + 1
        taps = [x[:, t : t + stride * (frames - 1) + 1 : stride] for t in range(3)]
        stacked = jnp.concatenate(taps, axis=-1)
        y = stacked @ kernel.reshape(-1, kernel.shape[-1])
        return y + broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)


class PointwiseConv(nnx.Module):
    """1x1x1 convolution. kernel: [I, O]."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (features, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y + broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)


class Conv2d(nnx.Module):
    """3x3 convolution on each frame. kernel: [3, 3, I, O]."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, features, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Frames, **kwargs: Any) -> Frames:
        kernel = self.kernel[...].astype(self.dtype)
        y = _per_frame(lambda images: conv2d(images.astype(self.dtype), kernel, **kwargs), x)
        return y + broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)


class ResidualBlock(nnx.Module):
    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, **dtypes: DTypeLike):
        self.norm1 = ChannelNorm(features, param_dtype=dtypes["param_dtype"])
        self.conv1 = CausalConv3d(features, out, rngs=rngs, **dtypes)
        self.norm2 = ChannelNorm(out, param_dtype=dtypes["param_dtype"])
        self.conv2 = CausalConv3d(out, out, rngs=rngs, **dtypes)
        self.shortcut = PointwiseConv(features, out, rngs=rngs, **dtypes) if features != out else None

    def __call__(self, x: Frames, cache: Cache) -> tuple[Frames, Cache]:
        cache1, cache2 = (None, None) if cache is None else cache
        y, cache1 = self.conv1(nnx.silu(self.norm1(x)), cache1)
        y, cache2 = self.conv2(nnx.silu(self.norm2(y)), cache2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (cache1, cache2)


class AttentionBlock(nnx.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: DTypeLike):
        self.norm = ChannelNorm(features, param_dtype=dtypes["param_dtype"])
        self.to_qkv = PointwiseConv(features, 3 * features, rngs=rngs, **dtypes)
        self.proj = PointwiseConv(features, features, rngs=rngs, **dtypes)

    def __call__(self, x: Frames, cache: Cache) -> tuple[Frames, Any]:
        b, f, h, w, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(b * f, h * w, 1, 3 * c), 3, axis=-1)
        y = attention(q, k, v).reshape(b, f, h, w, c)
        return x + self.proj(y), ()


class Downsample(nnx.Module):
    """Halves height and width; `in_time` also halves the frames after the first. Cache: the last frame."""

    def __init__(self, features: int, *, in_time: bool, rngs: nnx.Rngs, **dtypes: DTypeLike):
        self.conv = Conv2d(features, features, rngs=rngs, **dtypes)
        self.time_conv = TimeConv(features, features, rngs=rngs, **dtypes) if in_time else None

    def __call__(self, x: Frames, cache: Cache) -> tuple[Frames, Cache]:
        y = self.conv(x, stride=2, padding=((0, 1), (0, 1)))
        if self.time_conv is None:
            return y, ()
        last = y[:, -1:]
        if cache is not None:
            y = self.time_conv(jnp.concatenate([cache, y], axis=1), stride=2)
        return y, last


class Upsample(nnx.Module):
    """Doubles height and width and halves channels; `in_time` also doubles the frames after the first.

    Cache: the last two inputs of the time convolution, to which the first frame is not visible.
    """

    def __init__(self, features: int, *, in_time: bool, rngs: nnx.Rngs, **dtypes: DTypeLike):
        self.conv = Conv2d(features, features // 2, rngs=rngs, **dtypes)
        self.time_conv = TimeConv(features, 2 * features, rngs=rngs, **dtypes) if in_time else None

    def __call__(self, x: Frames, cache: Cache) -> tuple[Frames, Cache]:
        left = ()
        if self.time_conv is not None:
            if cache is None:
                left = jnp.zeros_like(jnp.concatenate([x, x], axis=1))
            else:
                x = jnp.concatenate([cache, x], axis=1)
                left = x[:, -2:]
                x = einops.rearrange(self.time_conv(x), "b f h w (two c) -> b (f two) h w c", two=2)
        b, f, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, :, None, :, None], (b, f, h, 2, w, 2, c)).reshape(b, f, 2 * h, 2 * w, c)
        return self.conv(doubled), left
