"""Queries, keys and values in 8 bits: one preparation for the kernel and for what it is compared with.

As in SageAttention (arXiv 2410.02367, 2411.10958): keys lose their mean over tokens, which moves all scores of a query
by the same number and so changes no weight, and which holds the outliers that whole channels of keys have. A query has
a scale of its own, with the softmax scale and log2(e) in it; 128 keys of a head share one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from x2v_jax.ops.attention.hopper_config import EIGHT_BIT_VALUES, SCALE_BLOCK, Precision
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

# Probabilities, at most 1, are times 2 ** 8 in e4m3: that fits its largest number, 448, and what is lost are those
# below 2 ** -18.
PROBABILITY_BITS = 8
# The order of keys, within groups of 16, that 8-bit probabilities have in registers (`hopper_products.py`).
KEY_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
_TINY = 1e-30
_E4M3_MAX = 448.0


class Quantized(NamedTuple):
    """q * q_scale times k * k_scale are scores in base 2; those of the keys' mean are left out.

    Attributes:
        q: int8 or float8_e4m3fn; k the same.
        q_scale: positive; with the softmax scale and log2(e).
        k_scale: positive; of 128 keys each, the last block may be short.
        v: [B, T, H, D] in 16 bits, or [B, T, H, D] float8_e4m3fn to be multiplied with v_scale.
        mean_score: what was left out, as a natural logarithm: the log-sum-exp needs it back.
    """

    q: Num[Array, "b lq h d"]
    q_scale: Float[Array, "b h lq"]
    k: Num[Array, "b lk h d"]
    k_scale: Float[Array, "b h blocks"]
    v: Num[Array, "b lk h d"]
    v_scale: Float[Array, "b h d"] | None
    mean_score: Float[Array, "b h lq"]


def query_dtype(precision: Precision) -> DTypeLike:
    """What queries and keys are multiplied in. precision: not "full"."""
    return jnp.int8 if precision in ("int8", "int8_e4m3") else jnp.float8_e4m3fn


def quantize(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    precision: Precision,
    key_length: Int[Array, ""] | None = None,
    rows: QuantizedRows | None = None,
) -> Quantized:
    """Only the first `key_length` keys and values count in means and scales.

    Args:
        precision: not "full".
        rows: the queries, where they are in 8 bits already; q is not read then.
    """
    dtype = query_dtype(precision)
    keys = k.shape[1]
    there = None if key_length is None else (jnp.arange(keys) < key_length)[:, None, None]

    k32 = _only(there, k.astype(jnp.float32))
    mean = k32.sum(1, keepdims=True) / (keys if key_length is None else key_length.astype(jnp.float32))
    centred = _only(there, k32 - mean)
    blocks = -(-keys // SCALE_BLOCK)
    k_scale = _scale_for(_of_blocks(jnp.abs(centred).max(-1), blocks).max(2), dtype)  # [B, blocks, H]
    every_key = jnp.repeat(k_scale, SCALE_BLOCK, axis=1)[:, :keys, :, None]

    if rows is None:
        q32 = q.astype(jnp.float32)
        q_scale = _scale_for(jnp.abs(q32).max(-1), dtype)  # [B, Lq, H]
        q8 = _cast(q32 / q_scale[..., None], dtype)
    else:
        q8, q_scale = rows.values, jnp.maximum(rows.scale, _TINY)
        q32 = q8.astype(jnp.float32) * q_scale[..., None]
    v, v_scale = _values(_only(there, v), precision)
    return Quantized(
        q8,
        (q_scale * (scale * math.log2(math.e))).swapaxes(1, 2),
        _cast(centred / every_key, dtype),
        k_scale.swapaxes(1, 2),
        v,
        v_scale,
        jnp.einsum("bqhd,bhd->bhq", q32, mean[:, 0] * scale),
    )


def transposed_values(
    v: Float[Array, "b lk h d"], in_key_order: bool, block: int = SCALE_BLOCK
) -> Float[Array, "b h d lk_padded"]:
    """Channels before keys, as an 8-bit product wants them, and whole blocks of keys; in `KEY_ORDER` if asked."""
    b, keys, h, d = v.shape
    padded = -(-keys // block) * block
    v = jnp.pad(v, ((0, 0), (0, padded - keys), (0, 0), (0, 0)))
    if in_key_order:
        v = v.reshape(b, padded // 16, 2, 4, 2, h, d).swapaxes(2, 3).reshape(b, padded, h, d)
        # As one transposition of seven axes XLA would read every byte from another sector; a plain one it tiles.
        v = with_layout_constraint(v, Layout((0, 1, 2, 3)))
    return v.transpose(0, 2, 3, 1)


def _values(v: Array, precision: Precision) -> tuple[Array, Array | None]:
    if precision not in EIGHT_BIT_VALUES:
        return (v if v.dtype.itemsize == 2 else v.astype(jnp.bfloat16)), None
    v32 = v.astype(jnp.float32)
    scale = _scale_for(jnp.abs(v32).max(1, keepdims=True), jnp.float8_e4m3fn)
    return _cast(v32 / scale, jnp.float8_e4m3fn), scale[:, 0]


def _only(there: Array | None, x: Array) -> Array:
    return x if there is None else jnp.where(there, x, 0)


def _of_blocks(x: Float[Array, "b lk h"], blocks: int) -> Float[Array, "b blocks 128 h"]:
    b, keys, h = x.shape
    return jnp.pad(x, ((0, 0), (0, blocks * SCALE_BLOCK - keys), (0, 0))).reshape(b, blocks, SCALE_BLOCK, h)


def _scale_for(largest: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Never zero: a row of zeros stays one, and a factor of zero would make a masked score of minus infinity NaN."""
    return jnp.maximum(largest / (127.0 if dtype == jnp.int8 else _E4M3_MAX), _TINY)


def _cast(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8)
    # The division may round to beyond the largest, and e4m3 has no infinity: it would become NaN.
    return jnp.clip(x, -_E4M3_MAX, _E4M3_MAX).astype(dtype)
