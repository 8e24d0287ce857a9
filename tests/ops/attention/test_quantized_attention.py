"""8-bit attention as a CPU simulates it: close to float32, and the same however it is cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x2v_jax.ops.attention import attention, simulated
from x2v_jax.ops.attention.quantized import KEY_ORDER, quantize, transposed_values
from x2v_jax.ops.attention.reference import attention_reference

EIGHT_BIT = ("int8", "e4m3", "int8_e4m3", "e4m3_all")
# Two roundings to three bits, of queries and of keys, are 0.0375 of a score whatever its size, so where scores have a
# standard deviation of one, as here, e4m3 cannot be nearer. int8 can, as long as nothing stands out.
GAUSSIAN = {"int8": 0.015, "e4m3": 0.042, "int8_e4m3": 0.042, "e4m3_all": 0.058}


def arrays(queries: int, keys: int, heads: int = 2, d: int = 128, kind: str = "gaussian", batch: int = 1):
    def draw(seed: int, n: int):
        key, shape = jax.random.key(seed), (batch, n, heads, d)
        return jax.random.t(key, 4.0, shape) / 2**0.5 if kind == "student" else jax.random.normal(key, shape)

    q, k, v = draw(0, queries), draw(1, keys), draw(2, keys)
    if kind == "channels":  # some channels of the keys are far from zero for every token
        k = k + jnp.where(jax.random.uniform(jax.random.key(5), (1, 1, heads, d)) > 0.95, 20.0, 0.0)
    return q, k, v


def relative(x, y) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "channels"])
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_errors_are_those_of_the_rounding(precision: str, kind: str):
    inputs = arrays(256, 1024, kind=kind)
    ours = attention(*inputs, precision=precision, implementation="reference")
    assert relative(ours, attention(*inputs)) < GAUSSIAN[precision]


# What rounding to three bits does to a score grows with the score: attention to few keys suffers. int8 does not mind.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "bound"), [("int8", 0.04), ("int8_e4m3", 0.05), ("e4m3", 0.1), ("e4m3_all", 0.11)]
)
def test_heavy_tails_cost_e4m3_most(precision: str, bound: float):
    inputs = arrays(256, 1024, kind="student")
    ours = attention(*inputs, precision=precision, implementation="reference")
    assert relative(ours, attention(*inputs)) < bound


@pytest.mark.slow
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_a_number_added_to_all_keys_changes_nothing(precision: str):
    q, k, v = arrays(32, 200)
    plain = attention(q, k, v, precision=precision, with_log_sum_exp=True)
    moved = attention(q, k + 8.0, v, precision=precision, with_log_sum_exp=True)
    # The mean is not exact, so a few keys round to the other side.
    assert relative(moved[0], plain[0]) < 5e-3
    shift = np.einsum("bqhd->bhq", q) * 8.0 * 128**-0.5
    np.testing.assert_allclose(moved[1], plain[1] + shift, atol=2e-2)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 140),
    heads=st.integers(1, 2),
    d=st.sampled_from([8, 64, 128]),
    precision=st.sampled_from(EIGHT_BIT),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    data=st.data(),
)
def test_any_shape_and_length(queries, keys, heads, d, precision, dtype, data):
    length = data.draw(st.integers(1, keys))
    q, k, v = (x.astype(dtype) for x in arrays(queries, keys, heads, d))
    out, log_sum_exp = attention(
        q, k, v, precision=precision, key_length=jnp.int32(length), implementation="reference", with_log_sum_exp=True
    )
    far, far_lse = attention(*(x.astype(jnp.float32) for x in (q, k[:, :length], v[:, :length])), with_log_sum_exp=True)
    assert out.dtype == dtype and out.shape == q.shape
    # Every factor of a score may be a sixteenth off, and so may weights and values.
    magnitudes = [np.abs(np.asarray(x[:, :n], np.float64)) for x, n in ((q, queries), (k, length))]
    magnitudes[1] += magnitudes[1].max(axis=1, keepdims=True)
    score = 0.14 * np.einsum("bqhd,bkhd->bhqk", *magnitudes).max() * d**-0.5 + 0.02
    np.testing.assert_allclose(log_sum_exp, far_lse, atol=score)
    bound = (np.expm1(2 * score) + 0.14) * np.abs(np.asarray(v, np.float64)).max()
    assert np.abs(np.asarray(out, np.float64) - np.asarray(far, np.float64)).max() < bound


@pytest.mark.slow
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_chunks_of_queries_change_nothing(precision: str, monkeypatch: pytest.MonkeyPatch):
    inputs = arrays(37, 300, batch=2)
    whole = attention_reference(*inputs, scale=0.1, precision=precision)
    monkeypatch.setattr(simulated, "_SCORES", 2 * 2 * 128 * 10)
    np.testing.assert_allclose(attention_reference(*inputs, scale=0.1, precision=precision), whole, atol=1e-6)


def test_memory_does_not_grow_with_queries_times_keys():
    def temporaries(n: int) -> int:
        x = jax.ShapeDtypeStruct((1, n, 2, 128), jnp.bfloat16)
        f = functools.partial(attention, precision="e4m3_all", implementation="reference")
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 8192 * 8192 * 2 * 4 / 8


def test_what_is_zero_stays_zero_and_is_no_trouble():
    q, k, v = arrays(8, 40)
    for precision in EIGHT_BIT:
        for zeroed in ((0 * q, k, v), (q, 0 * k, v)):
            out = attention(*zeroed, precision=precision, implementation="reference")
            # Every key weighs the same.
            assert relative(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)[:, :8]) < 0.05
        assert not attention(q, k, 0 * v, precision=precision, implementation="reference").any()


def test_rows_behind_the_length_do_not_touch_scales():
    q, k, v = arrays(8, 200)
    count = jnp.int32(130)
    for precision in EIGHT_BIT:
        plain = quantize(q, k, v, scale=1.0, precision=precision, key_length=count)
        filled = quantize(
            q, k.at[:, 130:].set(1e6), v.at[:, 130:].set(1e6), scale=1.0, precision=precision, key_length=count
        )
        for x, y in zip(plain, filled, strict=True):
            if x is not None:
                np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_keys_of_a_block_share_a_scale_and_tokens_do_not():
    q, k, v = arrays(5, 300)
    parts = quantize(q, k, v, scale=0.5, precision="int8")
    assert parts.q_scale.shape == (1, 2, 5) and parts.k_scale.shape == (1, 2, 3)
    assert int(jnp.abs(parts.k[:, :128].astype(jnp.int32)).max()) == 127
    back = parts.k[:, 256:].astype(jnp.float32) * parts.k_scale[:, None, :, 2, None]
    np.testing.assert_allclose(back, (k - k.mean(1, keepdims=True))[:, 256:], atol=float(parts.k_scale.max()) * 0.51)
    back = parts.q.astype(jnp.float32) * parts.q_scale.swapaxes(1, 2)[..., None] / (0.5 * np.log2(np.e))
    np.testing.assert_allclose(back, q, atol=float(jnp.abs(q).max()) / 250)


def test_values_in_the_order_of_registers():
    v = jnp.arange(40.0)[None, :, None, None] * jnp.ones((1, 1, 1, 2))
    plain, ordered = (np.asarray(transposed_values(v, x)[0, 0, 0]) for x in (False, True))
    np.testing.assert_array_equal(plain, [*range(40), *[0] * 88])
    np.testing.assert_array_equal(ordered[:32], [g + i for g in (0, 16) for i in KEY_ORDER])


@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_the_gradient_is_that_of_full_precision(precision: str):
    q, k, v = arrays(9, 30, d=16)
    weights = jax.random.normal(jax.random.key(8), q.shape)

    def gradients(**arguments):
        def loss(q, k, v):
            out, log_sum_exp = attention(q, k, v, with_log_sum_exp=True, key_length=jnp.int32(25), **arguments)
            return jnp.vdot(out, weights) + jnp.sum(jnp.sin(0 * log_sum_exp) + log_sum_exp)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for ours, plain in zip(gradients(precision=precision), gradients(), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
