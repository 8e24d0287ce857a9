"""Attention: exact in chunks, and never more than the stated memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import x2v_jax.ops.attention.reference as reference
from x2v_jax.ops.attention import attention


def _dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (10, 3)])
def test_attention_equals_the_formula(queries: int, keys: int):
    q, k, v = _random(0, 2, queries, 3, 8), _random(1, 2, keys, 3, 8), _random(2, 2, keys, 3, 8)
    np.testing.assert_allclose(attention(*map(jnp.float32, (q, k, v))), _dense(q, k, v), atol=1e-5)


@pytest.mark.parametrize("constant", ["_MAX_SCORES", "_MAX_SCORES_CPU"])
@pytest.mark.parametrize("max_scores", [6, 30, 100])
def test_chunks_change_nothing(max_scores: int, constant: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, constant, max_scores)
    monkeypatch.setattr(reference, "_FEW_SCORES", max_scores // 2)
    q, k, v = _random(0, 1, 11, 2, 4), _random(1, 1, 5, 2, 4), _random(2, 1, 5, 2, 4)
    np.testing.assert_allclose(attention(*map(jnp.float32, (q, k, v))), _dense(q, k, v), atol=1e-5)


def test_bfloat16_keeps_scores_in_float32():
    q, k, v = (jnp.bfloat16(_random(i, 1, 64, 2, 16)) for i in range(3))
    exact = _dense(*(np.asarray(x, np.float64) for x in (q, k, v)))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact) < 5e-3


def test_large_logits_do_not_overflow():
    q = jnp.full((1, 2, 1, 4), 300.0)
    v = jnp.arange(8.0).reshape(1, 2, 1, 4)
    assert np.isfinite(attention(q, q, v)).all()


# Three queries of one head at a time; two of the six heads at a time.
@pytest.mark.slow
@pytest.mark.parametrize("max_scores", [15, 110])
@pytest.mark.parametrize("key_length", [None, 3])
def test_blocks_change_neither_values_nor_gradients(
    max_scores: int, key_length: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reference, "_MAX_SCORES_CPU", max_scores)
    q, k, v = _random(0, 2, 11, 3, 4), _random(1, 2, 5, 3, 4), _random(2, 2, 5, 3, 4)
    arrays = [jnp.float32(x) for x in (q, k, v)]
    length = None if key_length is None else jnp.int32(key_length)

    def loss(attend, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(q, k, v, scale=0.5, key_length=length)))

    exact = _dense(q, k[:, :key_length], v[:, :key_length])
    np.testing.assert_allclose(attention(*arrays, scale=0.5, key_length=length), exact, atol=1e-5)
    got = jax.jit(jax.grad(lambda *x: loss(reference.attention_reference, *x), argnums=(0, 1, 2)))(*arrays)
    want = jax.grad(lambda *x: loss(reference._attend_by_queries, *x), argnums=(0, 1, 2))(*arrays)
    for ours, plain in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_a_gradient_on_cpu_keeps_no_scores_of_more_than_one_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_MAX_SCORES_CPU", 1 << 14)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 4), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v)), argnums=(0, 1, 2)))
    scores = 2 * 1024 * 1024 * 4
    assert gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < scores / 8
