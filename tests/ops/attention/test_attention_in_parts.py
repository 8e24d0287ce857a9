"""Attention to rows of a larger array: exact whatever the parts, in memory that does not depend on the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot.hlo import arrays_made
from x2v_jax.ops.attention import attention, attention_in_parts, in_parts

LAYER, HEADS, DIM = 1, 4, 8


def read(source, first_row, rows, first_head, heads):
    k, v = source
    size = (1, k.shape[1], rows, heads, DIM)
    return tuple(jax.lax.dynamic_slice(x, (LAYER, 0, first_row, first_head, 0), size)[0] for x in (k, v))


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _inputs(queries: int, rows: int, batch: int = 1):
    source = tuple(_random(i, 3, batch, rows, HEADS, DIM) for i in (1, 2))
    return _random(0, batch, queries, HEADS, DIM), source


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_parts, "_FEW_BYTES", 0)
    monkeypatch.setattr(in_parts, "_ROWS", 8)
    monkeypatch.setattr(in_parts, "_SCORES", HEADS * 8 * 16)


def _in_parts(q, source, length, rows):
    return attention_in_parts(q, source, read, rows=rows, length=length)


# 20 rows are parts of 8, 8 and 4; 37 queries are tiles of 16, the last cut short; 5 are one tile.
@pytest.mark.slow
@pytest.mark.parametrize(("queries", "rows", "batch"), [(37, 20, 1), (5, 20, 2), (37, 24, 1), (5, 3, 1)])
def test_parts_change_nothing_at_any_length(small_parts, queries: int, rows: int, batch: int):
    q, source = _inputs(queries, rows, batch)
    ours = jax.jit(functools.partial(_in_parts, rows=rows))
    whole = jax.jit(lambda n: attention(q, source[0][LAYER], source[1][LAYER], key_length=n))
    for length in {1, 7, 8, 9, 16, rows - 1, rows}:
        if length <= rows:
            np.testing.assert_allclose(ours(q, source, jnp.int32(length)), whole(jnp.int32(length)), atol=1e-6)


def test_rows_behind_the_length_count_for_nothing(small_parts):
    q, (k, v) = _inputs(5, 20)
    expected = _in_parts(q, (k, v), jnp.int32(9), 20)
    filled = _in_parts(q, (k.at[:, :, 9:].set(1e4), v.at[:, :, 9:].set(1e4)), jnp.int32(9), 20)
    np.testing.assert_array_equal(filled, expected)


def test_large_scores_do_not_overflow(small_parts):
    q, (k, v) = _inputs(5, 20)
    for factor in (300.0, -300.0):
        out = _in_parts(q * factor, (k, v), jnp.int32(20), 20)
        np.testing.assert_allclose(out, attention(q * factor, k[LAYER], v[LAYER]), atol=1e-4)


@pytest.mark.slow
def test_sums_are_float32_whatever_the_type(small_parts):
    q, source = jax.tree.map(jnp.bfloat16, _inputs(16, 512))
    exact = attention(*(jnp.float32(x) for x in (q, source[0][LAYER], source[1][LAYER])))
    out = _in_parts(q, source, jnp.int32(512), 512)
    assert out.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 5e-3


def test_gradients_are_those_of_the_whole(small_parts):
    q, source = _inputs(5, 20)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q, source: jnp.sum(jnp.sin(attend(q, source))), argnums=(0, 1)))(q, source)

    ours = gradients(lambda q, source: _in_parts(q, source, jnp.int32(13), 20))
    plain = gradients(lambda q, source: attention(q, source[0][LAYER, :, :13], source[1][LAYER, :, :13]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, plain)


@pytest.mark.parametrize(("most", "groups"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_heads_in_groups_change_nothing(most: int, groups: int, monkeypatch: pytest.MonkeyPatch):
    given = []

    def cudnn(q, k, v, **arguments):
        given.append(q.shape[2])
        return attention(q, k, v, implementation="reference", **arguments)

    q, source = _inputs(5, 20, 2)
    monkeypatch.setattr(in_parts, "_FEW_BYTES", 0)
    monkeypatch.setattr(in_parts, "_CUDNN_BYTES", most * 20 * 2 * 2 * DIM * 4)
    monkeypatch.setattr(in_parts, "attention_cudnn", cudnn)
    out = attention_in_parts(q, source, read, rows=20, length=jnp.int32(13), implementation="cudnn")
    np.testing.assert_allclose(out, attention(q, source[0][LAYER, :, :13], source[1][LAYER, :, :13]), atol=1e-6)
    assert set(given) == {HEADS // groups}


def test_memory_does_not_depend_on_the_rows(small_parts):
    def compiled(rows: int):
        structs = jax.eval_shape(lambda: _inputs(37, rows))
        return jax.jit(functools.partial(_in_parts, rows=rows)).lower(*structs, jnp.int32(1)).compile()

    few, many = compiled(2_000), compiled(60_000)
    assert few.memory_analysis().temp_size_in_bytes == many.memory_analysis().temp_size_in_bytes
    assert max(max(x.shape, default=0) for x in arrays_made(many.as_text())) < 2_000


def test_few_rows_are_read_at_once():
    q, source = _inputs(5, 20)
    assert "while" not in jax.jit(functools.partial(_in_parts, rows=20)).lower(q, source, jnp.int32(9)).as_text()
