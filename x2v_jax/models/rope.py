"""Rotary position embedding over frame, row and column (Wan2.1 wan/modules/model.py, `rope_apply`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import broadcast_to_rank
from jaxtyping import Array, Float, Int

from x2v_jax.ops.fused_norms import rotate

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


def rope_tables_at(frames: Int[Array, " f"], rows_columns: tuple[int, int], head_dim: int) -> RopeTables:
    """`rope_tables` for frames below causal.MAX_FRAMES, which may be traced: there is no table to run out of."""
    dim, rest = axis_dims(head_dim)[0], (len(frames), *rows_columns)
    angles = jnp.repeat(_frame_angles(frames, dim), 2, axis=1)[:, None, None]
    sign = np.tile(np.array([-1.0, 1.0], np.float32), dim // 2)
    cos = jnp.broadcast_to(jnp.cos(angles), (*rest, dim)).reshape(-1, dim)
    sin = jnp.broadcast_to(jnp.sin(angles) * broadcast_to_rank(sign, 4), (*rest, dim)).reshape(-1, dim)
    spatial = rope_tables(rest, head_dim)
    return RopeTables(
        jnp.concatenate([cos, spatial.cos[:, dim:]], -1), jnp.concatenate([sin, spatial.sin[:, dim:]], -1)
    )


def frame_shift_tables(shift: Int[Array, ""], head_dim: int) -> RopeTables:
    """Tables of one row that turn keys, already turned, on by `shift` frames, which may be traced."""
    return rope_tables_at(shift[None], (1, 1), head_dim)


def _frame_angles(frames: Array, dim: int) -> Array:
    """frames * frequencies modulo a full turn, in [-pi, pi): [f, dim / 2] float32, to 1e-6 for all frames < 2^20.

    A float32 product would be wrong by 6e-8 of a number that grows without bound. Turns are kept in 44-bit fixed point
    instead, in two words; uint32 drops whole turns by overflowing.
    """
    turns = _THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * np.pi)
    high, low = np.divmod(np.rint(turns * 2.0**44).astype(np.uint64), np.uint64(1 << 12))
    number = frames.astype(jnp.uint32)[:, None]
    fraction = number * high.astype(np.uint32)[None] + ((number * low.astype(np.uint32)[None]) >> 12)
    return jax.lax.bitcast_convert_type(fraction, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)


def apply_rope(x: Float[Array, "b l h d"], tables: RopeTables) -> Float[Array, "b l h d"]:
    """Turns adjacent channel pairs (2i, 2i+1) of each head, in float32."""
    return rotate(x.astype(jnp.float32), tables.cos, tables.sin)
