"""Fused norms: the reference is the networks' own arithmetic, the kernels are the reference, on a CPU and for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreter import interpreted, lower_for_cuda

from x2v_jax.errors import UserError
from x2v_jax.models.layers import normalize
from x2v_jax.models.rope import apply_rope, rope_tables
from x2v_jax.ops.fused_norms import layernorm_modulate_quantize, rmsnorm_rope
from x2v_jax.ops.fused_norms.hopper import layernorm_modulate_quantize_hopper
from x2v_jax.ops.fused_norms.hopper_rope import rmsnorm_rope_hopper
from x2v_jax.ops.fused_norms.reference import layernorm_modulate_quantize_reference, rmsnorm_rope_reference
from x2v_jax.ops.linear_8bit import QuantizedRows, linear_8bit, quantize_rows, quantize_weight

DTYPES = ("int8", "float8_e4m3fn")
EPS = 1e-6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def as_floats(x):
    if isinstance(x, QuantizedRows):
        return np.asarray(x.values, np.float32) * np.asarray(x.scale)[..., None]
    return np.asarray(x, np.float32)


def modulation(seed, batches, lengths, width):
    return normal(seed, batches, lengths, width), 0.3 * normal(seed + 1, batches, lengths, width)


def test_layernorm_is_the_networks():
    x, (shift, scale) = 3 * normal(0, 2, 6, 64) + 5, modulation(1, 2, 1, 64)
    rows = layernorm_modulate_quantize(x, shift, scale, EPS, "int8")
    want = quantize_rows(normalize(x, EPS) * (1 + scale) + shift, "int8")
    np.testing.assert_allclose(rows.scale, want.scale, rtol=1e-6)
    assert np.abs(np.asarray(rows.values, int) - np.asarray(want.values, int)).max() <= 1
    assert (np.asarray(rows.values) != np.asarray(want.values)).mean() < 0.01


def test_rope_is_the_networks():
    tables = rope_tables((2, 2, 3), 32)
    x, weight = normal(0, 2, 12, 96).astype(jnp.bfloat16), normal(1, 96)
    x32 = x.astype(jnp.float32)
    normed = x32 / jnp.sqrt(jnp.mean(x32**2, -1, keepdims=True) + EPS) * weight[None, None]
    want = apply_rope(normed.reshape(2, 12, 3, 32), tables)
    y = rmsnorm_rope(x, weight, EPS, tables, dtype=jnp.float32)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert rmsnorm_rope(x, weight, EPS, tables).dtype == jnp.bfloat16
    rows = rmsnorm_rope(x, weight, EPS, tables, dtype="int8")
    assert rows.values.shape == (2, 12, 3, 32) and rows.scale.shape == (2, 12, 3)
    np.testing.assert_allclose(as_floats(rows), want, atol=float(rows.scale.max()) * 0.51)


@settings(max_examples=10)
@given(
    shape=st.sampled_from([(1, 1, 8), (2, 5, 24)]),
    batches=st.booleans(),
    lengths=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_modulation_broadcasts_over_batch_and_tokens(shape, batches, lengths, dtype):
    b, n, d = shape
    x, (shift, scale) = normal(0, b, n, d), modulation(1, b if batches else 1, n if lengths else 1, d)
    rows = layernorm_modulate_quantize(x, shift, scale, EPS, dtype)
    whole = [jnp.broadcast_to(a, shape) for a in (shift, scale)]
    want = layernorm_modulate_quantize(x, *whole, EPS, dtype)
    np.testing.assert_array_equal(as_floats(rows), as_floats(want))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "batches", "lengths"), [(512, 2, 1), (5120, 1, 3), (5120, 2, 3)])
def test_the_layernorm_kernel_is_the_reference(dtype, width, batches, lengths):
    x, (shift, scale) = 3 * normal(0, 2, 3, width) + 5, modulation(1, batches, lengths, width)
    with interpreted():
        rows = jax.block_until_ready(layernorm_modulate_quantize_hopper(x, shift, scale, EPS, dtype))
    want = layernorm_modulate_quantize_reference(x, shift, scale, EPS, dtype)
    np.testing.assert_allclose(rows.scale, want.scale, rtol=1e-6)
    differs = np.asarray(rows.values).view(np.uint8) != np.asarray(want.values).view(np.uint8)
    assert differs.mean() < 0.001
    # One step: of int8, or of e4m3's three fraction bits.
    step = np.asarray(want.scale)[..., None] if dtype == "int8" else np.abs(as_floats(want)) / 8 + 1e-3
    assert (np.abs(as_floats(rows) - as_floats(want)) <= 1.01 * step).all()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("dtype", ["bfloat16", *DTYPES])
def test_the_rope_kernel_is_the_reference(dtype, heads):
    tables = rope_tables((1, 1, 3), 128)
    x, weight = 2 * normal(0, 2, 3, heads * 128).astype(jnp.bfloat16), normal(1, heads * 128)
    with interpreted():
        y = jax.block_until_ready(rmsnorm_rope_hopper(x, weight, *tables, EPS, jnp.dtype(dtype)))
    want = rmsnorm_rope_reference(x, weight, *tables, EPS, jnp.dtype(dtype))
    y, want = as_floats(y), as_floats(want)
    assert y.shape == (2, 3, heads, 128)
    assert np.linalg.norm(y - want) < 1e-3 * np.linalg.norm(want)


def test_a_row_that_is_not_finite_stays_so_in_the_kernels():
    x = normal(0, 1, 2, 512).astype(jnp.bfloat16).at[0, 1, 5].set(jnp.nan)
    zero = jnp.zeros((1, 1, 512))
    with interpreted():
        rows = jax.block_until_ready(layernorm_modulate_quantize_hopper(x, zero, zero, EPS, "int8"))
    tables = rope_tables((1, 1, 2), 128)
    with interpreted():
        y = jax.block_until_ready(rmsnorm_rope_hopper(x, jnp.ones(512), *tables, EPS, jnp.bfloat16))
    assert np.isfinite(rows.scale[0, 0]) and not np.isfinite(rows.scale[0, 1])
    assert np.isfinite(as_floats(y)[0, 0]).all() and np.isnan(as_floats(y)[0, 1]).all()


@pytest.mark.parametrize("width", [1536, 5120])
@pytest.mark.parametrize("lengths", [1, 32760])
def test_layernorm_is_one_kernel_on_cuda(width, lengths):
    shapes = [(1, 32760, width), (1, lengths, width), (1, lengths, width)]
    program = lower_for_cuda(
        lambda x, shift, scale: layernorm_modulate_quantize(x, shift, scale, EPS, "int8")[:2],
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes),
    )
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(("width", "rows"), [(1536, 4680), (5120, 75600)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rope_is_one_kernel_on_cuda(width, rows, dtype):
    program = lower_for_cuda(
        lambda x, w, cos, sin: rmsnorm_rope(x, w, EPS, (cos, sin), dtype=dtype),
        jax.ShapeDtypeStruct((1, rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width,), jnp.float32),
        *[jax.ShapeDtypeStruct((rows, 128), jnp.float32)] * 2,
    )
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(("width", "dtype"), [(1536, jnp.float32), (640, jnp.bfloat16)])
def test_what_the_rope_kernel_does_not_take_is_jnp(width, dtype):
    program = lower_for_cuda(
        lambda x, w, cos, sin: rmsnorm_rope(x, w, EPS, (cos, sin)),
        jax.ShapeDtypeStruct((1, 256, width), dtype),
        jax.ShapeDtypeStruct((width,), jnp.float32),
        *[jax.ShapeDtypeStruct((256, 128), jnp.float32)] * 2,
    )
    assert "custom_call" not in program


def test_gradients_reach_x_and_the_modulation_through_the_layer_that_reads_the_rows():
    x, (shift, scale) = normal(0, 1, 16, 64), modulation(1, 1, 1, 64)
    weight, weight_scale = quantize_weight(normal(3, 32, 64), "int8")
    direction = normal(4, 1, 16, 32)

    def ours(x, shift, scale):
        rows = layernorm_modulate_quantize(x, shift, scale, EPS, "int8")
        return jnp.sum(direction * linear_8bit(rows, weight, weight_scale, out_dtype=jnp.float32))

    def exact(x, shift, scale):
        y = normalize(x, EPS) * (1 + scale) + shift
        return jnp.sum(direction * (y @ (weight.astype(jnp.float32) * weight_scale[:, None]).T))

    gradients, truth = (jax.grad(f, argnums=(0, 1, 2))(x, shift, scale) for f in (ours, exact))
    for mine, right in zip(gradients, truth, strict=True):
        assert np.linalg.norm(mine - right) < 0.01 * np.linalg.norm(right)


def test_the_gradient_of_rope_is_the_references():
    tables = rope_tables((1, 8, 16), 128)
    x, weight = normal(0, 1, 128, 512).astype(jnp.bfloat16), normal(1, 512)

    def loss(implementation):
        def of(x, weight):
            return jnp.sum(rmsnorm_rope(x, weight, EPS, tables, implementation=implementation).astype(jnp.float32) ** 3)

        return jax.grad(of, argnums=(0, 1))(x, weight)

    for mine, want in zip(loss("hopper"), loss("reference"), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(want, np.float32))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, t: layernorm_modulate_quantize(x, x[:, :2], x, EPS, "int8"), r"shift has shape \(1, 2, 64\)"),
        (lambda x, t: layernorm_modulate_quantize(x, x, x[..., :1], EPS, "int8"), r"scale has shape \(1, 4, 1\)"),
        (lambda x, t: layernorm_modulate_quantize(x, x, x, EPS, "bfloat16"), "8-bit dtype is bfloat16"),
        (lambda x, t: layernorm_modulate_quantize(x, x, x, EPS, "int8", implementation="fast"), "linear is 'fast'"),
        (lambda x, t: rmsnorm_rope(x, x[0, 0], EPS, (t.cos[:3], t.sin[:3])), r"tables \(3, 32\)"),
        (lambda x, t: rmsnorm_rope(x, x[0, 0, :8], EPS, t), r"weight has shape \(8,\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, said):
    with pytest.raises(UserError, match=said):
        call(jnp.ones((1, 4, 64)), rope_tables((1, 2, 2), 32))
