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


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (10, 3)])
def test_attention_equals_the_formula(queries: int, keys: int):
    q, k, v = _random(0, 2, queries, 3, 8), _random(1, 2, keys, 3, 8), _random(2, 2, keys, 3, 8)
    np.testing.assert_allclose(attention(*map(jnp.float32, (q, k, v))), _dense(q, k, v), atol=1e-5)


@pytest.mark.parametrize("max_scores", [6, 30, 100])
def test_chunks_change_nothing(max_scores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_MAX_SCORES", max_scores)
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
