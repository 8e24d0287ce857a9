"""The norms and the rotation in jnp, alone as networks call them, and fused."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, quantize_rows_reference


def normalize(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer normalisation without parameters, in float32."""
    x = x.astype(jnp.float32)
    # The two-pass variance: E[x^2] - E[x]^2 cancels badly on the residual stream, whose mean can be large.
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def rms_normalize(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """x / rms(x) * weight over the last axis, in float32."""
    x = x.astype(jnp.float32)
    weight = lax.broadcast_to_rank(weight.astype(jnp.float32), x.ndim)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: Float[Array, "b l n h"], cos: Float[Array, "#l h"], sin: Float[Array, "#l h"]) -> Float[Array, "b l n h"]:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for adjacent channels of each head; x float32, sin signed."""
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    cos, sin = (lax.broadcast_to_rank(table[:, None], x.ndim) for table in (cos, sin))
    return x * cos + swapped * sin


def layernorm_modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "#b #l d"], scale: Float[Array, "#b #l d"], eps: float
) -> Float[Array, "b l d"]:
    """Layer normalisation without parameters, times 1 + scale, plus shift; float32."""
    return normalize(x, eps) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)


def layernorm_modulate_quantize_reference(
    x: Float[Array, "b l d"],
    shift: Float[Array, "#b #l d"],
    scale: Float[Array, "#b #l d"],
    eps: float,
    dtype: DTypeLike,
) -> QuantizedRows:
    return quantize_rows_reference(layernorm_modulate(x, shift, scale, eps), dtype)


def rmsnorm_rope_float32(
    x: Float[Array, "b l d"],
    weight: Float[Array, " d"],
    cos: Float[Array, "l h"],
    sin: Float[Array, "l h"],
    eps: float,
) -> Float[Array, "b l n h"]:
    """RMSNorm over D, then `rotate` in each head."""
    return rotate(rms_normalize(x, weight, eps).reshape(*x.shape[:2], -1, cos.shape[-1]), cos, sin)


def rmsnorm_rope_reference(
    x: Float[Array, "b l d"],
    weight: Float[Array, " d"],
    cos: Float[Array, "l h"],
    sin: Float[Array, "l h"],
    eps: float,
    dtype: DTypeLike,
) -> Array | QuantizedRows:
    y = rmsnorm_rope_float32(x, weight, cos, sin, eps)
    return quantize_rows_reference(y, dtype) if jnp.dtype(dtype).itemsize == 1 else y.astype(dtype)
