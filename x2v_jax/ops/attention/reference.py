"""Exact attention in plain jnp with bounded memory: what runs on CPU and what every kernel is compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Scores of one chunk of queries stay below this many float32 values (256 MiB).
_MAX_SCORES = 1 << 26


def attention_reference(
    q: Float[Array, "b lq h d"], k: Float[Array, "b lk h d"], v: Float[Array, "b lk h d"], *, scale: float
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v with float32 scores and softmax. Queries are taken in chunks; the result is the same."""
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
