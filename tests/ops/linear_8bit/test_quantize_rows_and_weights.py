"""Scales are those of LightX2V's formulas to the bit, and values are the nearest that 8 bits have."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x2v_jax.errors import UserError
from x2v_jax.ops.linear_8bit import quantize_rows, quantize_weight

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
DTYPES = tuple(LARGEST)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(1, 1, 1), (2, 9, 40), (1, 5, 33)]),
    exponent=st.integers(-6, 6),
    dtype=st.sampled_from(DTYPES),
    compiled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_have_the_scales_of_the_formula_and_the_nearest_values(shape, exponent, dtype, compiled, seed):
    x = (np.random.default_rng(seed).standard_t(3, shape) * 10.0**exponent).astype(np.float32)
    quantize = jax.jit(quantize_rows, static_argnums=1) if compiled else quantize_rows
    values, scale, _ = map(np.asarray, quantize(jnp.asarray(x), dtype))
    absmax = np.abs(x).max(-1)
    formula = absmax / np.float32(LARGEST[dtype])
    if dtype == "float8_e4m3fn":
        formula = np.maximum(formula, np.float32(1 / (448 * 512)))
    np.testing.assert_array_equal(scale, formula)
    assert values.dtype.name == dtype and values.shape == shape
    exact = x.astype(np.float64) / scale[..., None]
    if dtype == "int8":
        assert np.abs(values - exact).max() <= 0.5 + 1e-4
    else:
        # Half a unit in the last of three fraction bits, or of the smallest subnormal.
        assert np.all(np.abs(values.astype(np.float64) - exact) <= np.maximum(np.abs(exact) / 16, 2.0**-10) * 1.0001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_rounded_once(dtype):
    x, plus = (jax.random.normal(jax.random.key(i), (3, 40), jnp.bfloat16) for i in range(2))
    both = quantize_rows(x, dtype, plus=plus)
    exact = quantize_rows(x.astype(jnp.float32) + plus.astype(jnp.float32), dtype)
    np.testing.assert_array_equal(both.scale, exact.scale)
    np.testing.assert_array_equal(np.asarray(both.values, np.float32), np.asarray(exact.values, np.float32))
    gradients = jax.grad(lambda x, plus: quantize_rows(x, dtype, plus=plus).source.sum(), argnums=(0, 1))(x, plus)
    assert all((gradient == 1).all() for gradient in gradients)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(1, 1), (9, 40), (5, 33)]),
    exponent=st.integers(-7, 3),
    dtype=st.sampled_from(DTYPES),
    with_jax=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_weights_are_those_of_the_converter(shape, exponent, dtype, with_jax, seed):
    w = (np.random.default_rng(seed).standard_t(3, shape) * 10.0**exponent).astype(np.float32)
    values, scale = quantize_weight(jnp.asarray(w) if with_jax else w, dtype)
    assert isinstance(values, jax.Array) == isinstance(scale, jax.Array) == with_jax
    formula = np.maximum(np.abs(w).max(1), np.float32(1e-5)) / np.float32(LARGEST[dtype])
    np.testing.assert_array_equal(scale, formula)
    scaled = np.clip(w / formula[:, None], -LARGEST[dtype], LARGEST[dtype])
    want = np.round(scaled).astype(np.int8) if dtype == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), want.view(np.uint8))


def test_stacked_weights_are_quantized_row_by_row():
    w = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    values, scale = quantize_weight(w, "int8")
    assert values.shape == (3, 5, 7) and scale.shape == (3, 5)
    np.testing.assert_array_equal(values[1], quantize_weight(w[1], "int8")[0])


def test_bfloat16_weights_keep_float32_scales():
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(ml_dtypes.bfloat16)
    assert quantize_weight(w, "int8")[1].dtype == np.float32
    np.testing.assert_array_equal(quantize_weight(w, "int8")[1], quantize_weight(w.astype(np.float32), "int8")[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_next_to_nothing_are_zeros(dtype):
    values, scale, _ = quantize_rows(jnp.array([[0.0, 0.0], [1e-38, -1e-38]]), dtype)
    assert not np.asarray(values, np.float32).any() and np.isfinite(scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_so_and_harms_no_other(dtype, bad):
    values, scale, _ = quantize_rows(jnp.array([[1.0, bad], [1.0, 2.0]]), dtype)
    product = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    assert not np.isfinite(product[0]).all() and not np.isfinite(scale[0])
    assert np.isfinite(product[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_a_row_has_the_largest_value(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 16)), jnp.float32)
    values = np.abs(np.asarray(quantize_rows(x, dtype).values, np.float32))
    assert (values.max(-1) == LARGEST[dtype]).all()


def test_gradients_pass_straight_through():
    gradient = jax.grad(lambda x: quantize_rows(x, "int8").source.sum())(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, np.ones((2, 3)))


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_weight])
def test_other_dtypes_are_refused(quantize):
    with pytest.raises(UserError, match="8-bit dtype is float8_e5m2; it must be int8 or float8_e4m3fn"):
        quantize(jnp.ones((2, 2)), "float8_e5m2")
