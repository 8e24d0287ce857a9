"""Rotary position embedding over frame, row and column (Wan2.1 wan/modules/model.py, `rope_apply`)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_THETA = 10_000.0


class RopeTables(NamedTuple):
    """cos and sin of each token's angles, float32, laid out for adjacent pairs: [L, head_dim]."""

    cos: Float[Array, "l d"]
    sin: Float[Array, "l d"]


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many channels of a head turn with frame, row and column: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_tables(grid: tuple[int, int, int], head_dim: int, start_frame: int = 0) -> RopeTables:
    """Tables for tokens in (frame, row, column) order, `grid` of them along each axis.

    Angles are exact: positions times frequencies in float64 on the host, one small table an axis.
    """
    cos, sin = [], []
    for axis, (length, dim) in enumerate(zip(grid, axis_dims(head_dim), strict=True)):
        frequencies = _THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        positions = np.arange(length, dtype=np.float64) + (start_frame if axis == 0 else 0)
        angles = np.outer(positions, frequencies)
        shape = [1, 1, 1, dim]
        shape[axis] = length
        pairs = np.repeat(angles, 2, axis=1)
        sign = np.tile([-1.0, 1.0], dim // 2)  # (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)
        cos.append(jnp.broadcast_to(jnp.asarray(np.cos(pairs), jnp.float32).reshape(shape), (*grid, dim)))
        sin.append(jnp.broadcast_to(jnp.asarray(np.sin(pairs) * sign, jnp.float32).reshape(shape), (*grid, dim)))
    flat = (-1, head_dim)
    return RopeTables(jnp.concatenate(cos, -1).reshape(flat), jnp.concatenate(sin, -1).reshape(flat))


def apply_rope(x: Float[Array, "b l h d"], tables: RopeTables) -> Float[Array, "b l h d"]:
    """Turns adjacent channel pairs (2i, 2i+1) of each head, in float32."""
    x = x.astype(jnp.float32)
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return x * tables.cos[:, None] + swapped * tables.sin[:, None]
