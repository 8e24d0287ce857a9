"""Symmetric 8-bit quantization: activations a row (token) at a time, weights an output channel at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.errors import UserError

# Largest magnitude that each 8-bit dtype is used with. int8 keeps -128 unused for activations, so that x and -x agree.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
# LightX2V's converter: a weight row that is all zeros still gets a scale that one can divide by.
_SMALLEST_WEIGHT = 1e-5
# vLLM's per-token float8 kernel: scales below this would make x / scale overflow for nothing.
_SMALLEST_E4M3_SCALE = 1 / (448 * 512)
# 127 / absmax overflows float32 below 4e-37; such rows are zeros for every purpose.
_SMALLEST_ROW = 1e-30


class QuantizedRows(NamedTuple):
    """Rows x ~ values * scale[..., None].

    Attributes:
        values: [..., K] int8 or float8_e4m3fn.
        scale: [...] float32.
        source: [..., K], what was quantized, or None. Only gradients read it, which pass straight through the rounding;
            a compiled program without gradients does not even compute it.
    """

    values: Array
    scale: Float[Array, "..."]
    source: Array | None = None


def quantize_rows_reference(
    x: Float[Array, "*b k"], dtype: DTypeLike, plus: Float[Array, "*b k"] | None = None
) -> QuantizedRows:
    """`quantize_rows` in jnp."""
    x = x.astype(jnp.float32) if plus is None else x.astype(jnp.float32) + plus.astype(jnp.float32)
    scale, inverse = row_scales(jnp.max(jnp.abs(x), axis=-1), dtype)
    return QuantizedRows(round_to(x * inverse[..., None], dtype), scale)


def row_scales(absmax: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """(scale, what to multiply a row with before rounding) of rows whose largest magnitudes are `absmax`, float32.

    The kernels call this too: one multiplication an element instead of a division, and the same one everywhere, so that
    all implementations round alike.
    """
    scale = absmax / _divisor(absmax, LARGEST[name_of(dtype)])
    if name_of(dtype) == "int8":
        tiny = absmax < _SMALLEST_ROW
        return scale, jnp.where(tiny, 0.0, 127.0 / jnp.where(tiny, 1.0, absmax))
    scale = jnp.maximum(scale, _SMALLEST_E4M3_SCALE)
    return scale, 1.0 / scale


def _divisor(x: Any, value: Any) -> Any:
    # XLA turns a division by a constant into a multiplication by its rounded reciprocal, off by one unit in the
    # last place for 5 % (127) to half (448) of all x. It cannot prove 0 * x to be zero.
    return value + 0 * x


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """Scaled float32 values in 8 bits, ties to even. They are within the dtype's range but for rounding errors."""
    return jnp.round(x).astype(dtype) if name_of(dtype) == "int8" else x.astype(dtype)


def quantize_weight(weight: object, dtype: DTypeLike) -> tuple[Any, Any]:
    """Quantizes each output channel of a weight by LightX2V's formula (tools/convert/converter.py).

    scale = max(absmax of the row, 1e-5) / 127 (int8) or / 448 (float8_e4m3fn); values = weight / scale rounded to
    nearest. Ties go to even; LightX2V's float8 rounds them away from zero, the one difference. Scales stay float32
    even if the weight is bfloat16, where LightX2V rounds them too.

    Args:
        weight: [..., N, K], one row an output channel; a NumPy array (then NumPy computes it) or a JAX array.
        dtype: int8 or float8_e4m3fn.

    Returns:
        (values [..., N, K] in `dtype`, scale [..., N] float32), arrays of the kind that was given.
    """
    numpy: Any = jnp if isinstance(weight, jax.Array) else np
    largest = LARGEST[name_of(dtype)]
    w = numpy.asarray(weight).astype(np.float32)
    absmax = numpy.maximum(numpy.max(numpy.abs(w), axis=-1), np.float32(_SMALLEST_WEIGHT))
    scale = absmax / _divisor(absmax, np.float32(largest))
    values = numpy.clip(w / scale[..., None], -largest, largest)
    values = numpy.round(values) if name_of(dtype) == "int8" else values
    return values.astype(numpy_dtype(dtype)), scale


def name_of(dtype: DTypeLike) -> str:
    """The name, "int8" or "float8_e4m3fn"; UserError for every other dtype."""
    name = np.dtype(numpy_dtype(dtype)).name
    if name not in LARGEST:
        raise UserError(f"8-bit dtype is {name}; it must be int8 or float8_e4m3fn.")
    return name


def numpy_dtype(dtype: DTypeLike) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)
