"""8-bit attention as the Hopper kernel computes it, in plain jnp and bounded memory: its errors without a GPU.

The same quantization, tiles of 128 keys in the same order, the same online softmax, probabilities rounded to the same
type: what differs is the order in which a product adds up, and that 8-bit tensor cores add up with fewer bits.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from x2v_jax.ops.attention.hopper_config import SCALE_BLOCK, Precision
from x2v_jax.ops.attention.quantized import PROBABILITY_BITS, Quantized, quantize
from x2v_jax.ops.attention.tiles import CUT, CUTS, FIRST_FULL, FULL, SINK_FULL, Span, tiles_of_length, tiles_of_span
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

# Scores that exist at one time: 16 MiB, as of float32.
_SCORES = 1 << 22


def attention_simulated(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    precision: Precision,
    key_length: Int[Array, ""] | None = None,
    spans: Sequence[Span] | None = None,
    rows: QuantizedRows | None = None,
) -> tuple[Float[Array, "b lq h d"], Float[Array, "b h lq"]]:
    """(attention, log-sum-exp of scores) with 8-bit products. No gradient: see `api.py`.

    key_length: only the first so many keys count, at least 1; may be traced.
    spans: which queries attend to which keys, instead of all to the first `key_length`.
    rows: see `quantize`.
    """
    parts = quantize(q, k, v, scale=scale, precision=precision, key_length=key_length, rows=rows)
    parts = parts._replace(k=_whole_blocks(parts.k), v=_whole_blocks(parts.v))
    attend = functools.partial(_attend_in_chunks, parts)
    if spans is None:
        tiles = tiles_of_length(k.shape[1] if key_length is None else key_length, SCALE_BLOCK)[0]
        out, log_sum_exp = attend(parts.q, parts.q_scale, tiles)
    else:
        each = [
            attend(
                parts.q[:, span.start : span.stop],
                parts.q_scale[:, :, span.start : span.stop],
                jnp.asarray(tiles_of_span(span, SCALE_BLOCK), jnp.int32),
            )
            for span in spans
        ]
        out = jnp.concatenate([x for x, _ in each], axis=2)
        log_sum_exp = jnp.concatenate([x for _, x in each], axis=2)
    return out.swapaxes(1, 2).astype(q.dtype), log_sum_exp + parts.mean_score


def _whole_blocks(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % SCALE_BLOCK), (0, 0), (0, 0)))


def _attend_in_chunks(parts: Quantized, q: Array, q_scale: Array, tiles: Array) -> tuple[Array, Array]:
    b, lq, h, d = q.shape
    chunks = math.ceil(lq * b * h * SCALE_BLOCK / _SCORES)
    chunk = math.ceil(lq / chunks)
    chunks = math.ceil(lq / chunk)
    pad = chunks * chunk - lq
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, chunks, chunk, h, d).transpose(1, 0, 3, 2, 4)
    # A factor of one: zero times minus infinity would be no number.
    q_scale = jnp.pad(q_scale, ((0, 0), (0, 0), (0, pad)), constant_values=1)
    q_scale = q_scale.reshape(b, h, chunks, chunk).transpose(2, 0, 1, 3)
    out, log_sum_exp = jax.lax.map(lambda x: _attend(parts, x[0], x[1], tiles), (q, q_scale))
    out = jnp.moveaxis(out, 0, 2).reshape(b, h, chunks * chunk, d)[:, :, :lq]
    return out, jnp.moveaxis(log_sum_exp, 0, 2).reshape(b, h, chunks * chunk)[:, :, :lq]


def _attend(parts: Quantized, q: Array, q_scale: Array, tiles: Array) -> tuple[Array, Array]:
    """One chunk of queries [B, H, L, D], scales [B, H, L]; float32 ([B, H, L, D], [B, H, L])."""
    # Products of 8-bit numbers are exact in float32, and so is the sum of 128 of int8.
    q = q.astype(jnp.float32)
    bits = 0 if parts.v_scale is None else PROBABILITY_BITS

    def rows_of(x: Array, tile: Any) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, tile * SCALE_BLOCK, SCALE_BLOCK, axis=1).astype(jnp.float32)

    def step(tile: Any, limits: tuple[Any, Any] | None, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        out, top, total = carry
        scores = jnp.einsum("bhqd,bkhd->bhqk", q, rows_of(parts.k, tile), preferred_element_type=jnp.float32)
        scores = scores * (q_scale * jax.lax.dynamic_index_in_dim(parts.k_scale, tile, axis=2))[..., None]
        if limits is not None:
            key = tile * SCALE_BLOCK + jnp.arange(SCALE_BLOCK)
            scores = jnp.where((key >= limits[0]) & (key < limits[1]), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        decay = jnp.exp2(top - new_top)
        p = jnp.exp2(scores - (new_top - bits)[..., None])
        total = total * decay + p.sum(-1)
        p = p.astype(parts.v.dtype).astype(jnp.float32)
        more = jnp.einsum("bhqk,bkhd->bhqd", p, rows_of(parts.v, tile), preferred_element_type=jnp.float32)
        return out * decay[..., None] + more, new_top, total

    def full_step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        in_sink = tiles[SINK_FULL]
        return step(jnp.where(i < in_sink, i, tiles[FIRST_FULL] + i - in_sink), None, carry)

    def cut_step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        tile, first, stop = (tiles[CUTS + 3 * i + column] for column in range(3))
        return step(tile, (first, stop), carry)

    column = jnp.zeros(q_scale.shape, jnp.float32)
    carry = jax.lax.fori_loop(0, tiles[FULL], full_step, (jnp.zeros(q.shape, jnp.float32), column - jnp.inf, column))
    out, top, total = jax.lax.fori_loop(0, tiles[CUT], cut_step, carry)
    out = out / total[..., None]
    if parts.v_scale is not None:
        out = out * parts.v_scale[:, :, None]
    return out, (top - bits) * math.log(2) + jnp.log(total)
