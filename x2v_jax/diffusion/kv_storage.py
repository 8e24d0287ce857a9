"""What keys and values are kept in: as floating-point numbers, or in 8 bits with a scale of their own for every head.

Wan's heads have 128 channels, so a scale stands for 128 numbers, as in SageAttention (arXiv 2410.02367), and costs 3 %
beside them. Every row of every head is scaled apart: what is written over one row changes no other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from x2v_jax.errors import UserError

# What keys and what values are kept in.
_EIGHT_BIT = {"int8": (jnp.int8, jnp.int8), "int8_e4m3": (jnp.int8, jnp.float8_e4m3fn)}
_FLOATING = ("float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EightBit:
    """numbers * scale. numbers: int8 or float8_e4m3fn."""

    numbers: Num[Array, "*rows h d"]
    scale: Float[Array, "*rows h 1"]


Stored = Array | EightBit


def storage_dtypes(dtype: DTypeLike) -> tuple[DTypeLike, DTypeLike]:
    """(dtype of keys, dtype of values) for a cache dtype: float32, bfloat16, float16, "int8" or "int8_e4m3".

    "int8_e4m3" is int8 keys and float8_e4m3fn values, which keep 3 bits of every number, large or small: it is for
    values of which a few channels are twenty times the others; elsewhere int8 is nearer.

    Raises:
        UserError: another dtype.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name in _EIGHT_BIT:
        return _EIGHT_BIT[name]
    if name in _FLOATING:
        return jnp.dtype(name), jnp.dtype(name)
    choices = ", ".join(repr(choice) for choice in (*_FLOATING, *_EIGHT_BIT))
    raise UserError(f"the dtype of the cache of keys and values is {name!r}; choose {choices}")


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Stored:
    """Zeros [..., H, D]."""
    if not _is_eight_bit(dtype):
        return jnp.zeros(shape, dtype)
    return EightBit(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), jnp.float32))


def store(x: Float[Array, "*rows h d"], dtype: DTypeLike) -> Stored:
    """x as it is kept: the largest number of each head becomes the largest that fits."""
    if not _is_eight_bit(dtype):
        return x.astype(dtype)
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / largest
    scaled = x / jnp.where(scale == 0, 1, scale)
    # The division may round to beyond the largest, and float8 has no infinity: it would become NaN.
    numbers = jnp.clip(jnp.round(scaled) if whole else scaled, -largest, largest)
    return EightBit(numbers.astype(dtype), scale)


def restore(stored: Stored, dtype: DTypeLike) -> Float[Array, "*rows h d"]:
    """What was stored, in the type to compute in."""
    if isinstance(stored, EightBit):
        stored = stored.numbers.astype(jnp.float32) * stored.scale
    return stored.astype(dtype)


def dtype_of(stored: Stored) -> jnp.dtype:
    return (stored.numbers if isinstance(stored, EightBit) else stored).dtype


def _is_eight_bit(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).itemsize == 1
