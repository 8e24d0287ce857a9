"""Exact attention in plain jnp with bounded memory: what runs on CPU and what every kernel is compared with."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Scores that exist at one time stay below this many float32 values: 256 MiB on accelerators. On CPU 32 MiB: several
# times as fast as 256, since the scores of one block are written and read again before they leave the cache.
_MAX_SCORES = 1 << 26
_MAX_SCORES_CPU = 1 << 23


def attention_reference(
    q: Float[Array, "b lq h d"], k: Float[Array, "b lk h d"], v: Float[Array, "b lk h d"], *, scale: float
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v with float32 scores and softmax. Queries are taken in chunks; the result is the same."""
    cpu = functools.partial(_attend_by_heads, scale=scale)
    default = functools.partial(_attend_by_queries, scale=scale)
    return jax.lax.platform_dependent(q, k, v, cpu=cpu, default=default)


def _attend_by_queries(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    b, lq, h, _ = q.shape
    chunk = max(1, _MAX_SCORES // (b * h * k.shape[1]))
    if chunk >= lq:
        return _attend(q, k, v, scale)
    chunks = -(-lq // chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - lq), (0, 0), (0, 0)))
    split = padded.reshape(b, chunks, chunk, h, -1).swapaxes(0, 1)
    out = jax.lax.map(lambda q_chunk: _attend(q_chunk, k, v, scale), split)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, h, -1)[:, :lq]


def _attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _attend_by_heads(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """One group of heads at a time, heads leading: with heads behind, XLA transposes the scores before the product."""
    b, lq, h, d = q.shape
    heads = [x.swapaxes(1, 2).reshape(b * h, x.shape[1], d) for x in (q, k, v)]
    attend = functools.partial(_attend_heads, scale=scale)
    group = _largest_divisor(b * h, max(1, _MAX_SCORES_CPU // (lq * k.shape[1])))
    if group == b * h:
        out = attend(*heads)
    else:
        groups = [x.reshape(-1, group, *x.shape[1:]) for x in heads]
        out = jax.lax.map(lambda group: _attend_in_chunks(*group, attend), groups)
    return out.reshape(b, h, lq, d).swapaxes(1, 2)


def _attend_in_chunks(q: Array, k: Array, v: Array, attend) -> Array:
    # Without the checkpoint, a gradient would keep the scores of all blocks after all.
    attend = jax.checkpoint(attend)
    g, lq, d = q.shape
    chunks = math.ceil(g * lq * k.shape[1] / _MAX_SCORES_CPU)
    if chunks == 1:
        return attend(q, k, v)
    chunk = math.ceil(lq / chunks)
    ...


def _attend_heads(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """[heads, queries, d]. Divides by the sum of the weights after the product: d divisions a query instead of keys."""
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32) * scale
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    out = jax.lax.dot_general(
        weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    return (out / total).astype(q.dtype)
