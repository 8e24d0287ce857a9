"""Exact attention in plain jnp with bounded memory: what runs on CPU and what every kernel is compared with."""

import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from x2v_jax.ops.attention.hopper_config import Precision
from x2v_jax.ops.attention.simulated import attention_simulated
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

# Scores that exist at one time stay below this many float32 values: 256 MiB on accelerators, and 32 MiB where that
# leaves enough queries for a product to be worth its name. On CPU 32 MiB: several times as fast as 256, since the
# scores of one block are written and read again before they leave the cache.
_MAX_SCORES = 1 << 26
_FEW_SCORES = 1 << 23
_FEW_QUERIES = 256
_MAX_SCORES_CPU = 1 << 23


def attention_reference(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
    precision: Precision = "full",
    with_log_sum_exp: bool = False,
    rows: QuantizedRows | None = None,
) -> Any:
    """softmax(q k^T * scale) v with float32 scores and softmax. Queries are taken in chunks; the result is the same.

    Args:
        key_length: only the first so many keys are attended, at least 1; may be traced. None: all.
        precision: other than "full", what a Hopper GPU computes in 8 bits, rounding for rounding; its gradient is that
            of full precision.
        with_log_sum_exp: (attention, natural logarithm of the sum of the scores' exponentials [B, H, Lq]) comes back.
        rows: with 8 bits, see `quantized.quantize`.
    """
    if precision != "full":
        return _simulated(q, k, v, rows, scale, precision, key_length, with_log_sum_exp)
    fixed: dict[str, Any] = {"scale": scale, "key_length": key_length, "with_log_sum_exp": with_log_sum_exp}
    cpu = functools.partial(_attend_by_heads, **fixed)
    default = functools.partial(_attend_by_queries, **fixed)
    return jax.lax.platform_dependent(q, k, v, cpu=cpu, default=default)


def _simulated(
    q: Array,
    k: Array,
    v: Array,
    rows: QuantizedRows | None,
    scale: float,
    precision: Precision,
    key_length: Array | None,
    with_log_sum_exp: bool,
) -> Any:
    def exact(q: Array, k: Array, v: Array, key_length: Array | None) -> Any:
        return attention_reference(q, k, v, scale=scale, key_length=key_length, with_log_sum_exp=with_log_sum_exp)

    def forward(q: Array, k: Array, v: Array, key_length: Array | None, rows: QuantizedRows | None) -> Any:
        both = attention_simulated(q, k, v, scale=scale, precision=precision, key_length=key_length, rows=rows)
        return both if with_log_sum_exp else both[0]

    return with_gradient_of(exact, forward)(q, k, v, key_length, rows)


def _attend_by_queries(
    q: Array, k: Array, v: Array, *, scale: float, key_length: Array | None, with_log_sum_exp: bool = False
) -> Any:
    b, lq, h, _ = q.shape
    attend = functools.partial(_attend, scale=scale, key_length=key_length, with_log_sum_exp=with_log_sum_exp)
    one = b * h * k.shape[1]
    chunk = max(1, _FEW_SCORES // one, min(_FEW_QUERIES, _MAX_SCORES // one))
    if chunk >= lq:
        out = attend(q, k, v)
    else:
        chunks = -(-lq // chunk)
        padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - lq), (0, 0), (0, 0)))
        split = padded.reshape(b, chunks, chunk, h, -1).swapaxes(0, 1)
        # Without jax.checkpoint a gradient would keep the scores of all chunks.
        out = jax.lax.map(lambda q_chunk: jax.checkpoint(attend)(q_chunk, k, v), split)
        out = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, chunks * chunk, *x.shape[3:])[:, :lq], out)
    return (out[0], out[1].swapaxes(1, 2)) if with_log_sum_exp else out


def _attend(
    q: Array, k: Array, v: Array, *, scale: float, key_length: Array | None, with_log_sum_exp: bool = False
) -> Any:
    """[B, queries, H, D], and, if asked, [B, queries, H]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    scores = _without_keys_past(key_length, scores)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.astype(q.dtype)
    return (out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)) if with_log_sum_exp else out


def _attend_by_heads(
    q: Array, k: Array, v: Array, *, scale: float, key_length: Array | None, with_log_sum_exp: bool = False
) -> Any:
    """Groups of heads in turn, heads leading: with heads behind, XLA on CPU transposes scores before products."""
    b, lq, h, d = q.shape
    heads = [einops.rearrange(x, "b l h d -> (b h) l d") for x in (q, k, v)]
    attend = functools.partial(_attend_heads, scale=scale, key_length=key_length, with_log_sum_exp=with_log_sum_exp)
    group = max(1, _MAX_SCORES_CPU // (lq * k.shape[1]))
    if group >= b * h:
        out = attend(*heads)
    else:
        group = next(g for g in range(group, 0, -1) if b * h % g == 0)
        # Without jax.checkpoint a gradient would keep the scores of all blocks.
        by_queries = functools.partial(_in_chunks, jax.checkpoint(attend))
        out = jax.lax.map(lambda x: by_queries(*x), [x.reshape(-1, group, *x.shape[1:]) for x in heads])
    if not with_log_sum_exp:
        return out.reshape(b, h, lq, d).swapaxes(1, 2)
    return out[0].reshape(b, h, lq, d).swapaxes(1, 2), out[1].reshape(b, h, lq)


def _in_chunks(attend: Callable[[Array, Array, Array], Any], q: Array, k: Array, v: Array) -> Any:
    g, lq, d = q.shape
    chunks = min(lq, math.ceil(g * lq * k.shape[1] / _MAX_SCORES_CPU))
    if chunks == 1:
        return attend(q, k, v)
    chunk = math.ceil(lq / chunks)
    chunks = math.ceil(lq / chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - lq), (0, 0)))
    out = jax.lax.map(lambda q: attend(q, k, v), padded.reshape(g, chunks, chunk, d).swapaxes(0, 1))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(g, chunks * chunk, *x.shape[3:])[:, :lq], out)


def _attend_heads(
    q: Array, k: Array, v: Array, *, scale: float, key_length: Array | None, with_log_sum_exp: bool = False
) -> Any:
    """[heads, queries, d]. Divides by the sum of the weights after the product: d divisions a query instead of keys."""
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32) * scale
    scores = _without_keys_past(key_length, scores)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = jax.lax.dot_general(
        weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    out = (out / total).astype(q.dtype)
    return (out, (top + jnp.log(total))[..., 0]) if with_log_sum_exp else out


def _without_keys_past(key_length: Array | None, scores: Array) -> Array:
    return scores if key_length is None else jnp.where(jnp.arange(scores.shape[-1]) < key_length, scores, -jnp.inf)


Attend = Callable[..., Any]


def with_gradient_of(exact: Attend, forward: Attend) -> Attend:
    """`forward`, with the gradient of `exact` at the same inputs (q, k, v, key length), which are all that is kept.

    A kernel has no gradient of its own, and rounding to 8 bits has none that is of use: it passes straight through.
    What `forward` takes behind these four has no gradient.
    """

    @jax.custom_vjp
    def attend(*inputs: object) -> Any:
        return forward(*inputs)

    def keep(*inputs: object) -> Any:
        return forward(*inputs), (inputs[:4], [None] * len(inputs[4:]))

    def backward(kept: Any, gradient: Any) -> Any:
        (*inputs, key_length), more = kept
        pullback = jax.vjp(lambda q, k, v: exact(q, k, v, key_length), *inputs)[1]
        return *pullback(gradient), None, *more

    attend.defvjp(keep, backward)
    return attend
