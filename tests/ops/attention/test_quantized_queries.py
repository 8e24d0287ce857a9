"""Attention that is given its queries in 8 bits, as the norm with rotary embedding makes them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreter import interpreted, lower_for_cuda, teach

from x2v_jax.errors import UserError
from x2v_jax.ops import self_check
from x2v_jax.ops.attention import api, attention, choose_hopper, query_dtype
from x2v_jax.ops.attention.hopper import attention_hopper
from x2v_jax.ops.attention.hopper_config import EIGHT_BIT_VALUES, HopperConfig, Precision
from x2v_jax.ops.fused_norms import rmsnorm_rope
from x2v_jax.ops.linear_8bit import QuantizedRows, quantize_rows

EIGHT_BIT: tuple[Precision, ...] = ("int8", "e4m3", "int8_e4m3", "e4m3_all")


def inputs(queries: int = 24, keys: int = 40, d: int = 128, dtype=jnp.bfloat16) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (1, n, 2, d), dtype) for i, n in enumerate((queries, keys, keys))]


def relative(x, y) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def rounded(q: jax.Array, precision: Precision) -> tuple[QuantizedRows, jax.Array]:
    """(rows that only tell of q by their numbers, what these numbers are)."""
    rows = quantize_rows(q, query_dtype(precision))
    return rows._replace(source=jnp.zeros_like(q)), rows.values.astype(jnp.float32) * rows.scale[..., None]


@pytest.mark.slow
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_it_is_the_attention_of_the_rounded_numbers(precision: Precision):
    q, k, v = inputs(dtype=jnp.float32)
    rows, numbers = rounded(q, precision)
    ours, log_sum_exp = attention(rows, k, v, precision=precision, with_log_sum_exp=True)
    # Numbers that were rounded once are not changed by being rounded again.
    other, other_log_sum_exp = attention(numbers, k, v, precision=precision, with_log_sum_exp=True)
    np.testing.assert_allclose(ours, other, atol=1e-5)
    np.testing.assert_allclose(log_sum_exp, other_log_sum_exp, atol=1e-5)


def test_tokens_of_zeros_attend_to_all_keys_alike():
    _, k, v = inputs(dtype=jnp.float32)
    rows = quantize_rows(jnp.zeros((1, 3, 2, 128)), "int8")
    ours = attention(rows, k, v, precision="int8", key_length=jnp.int32(30))
    np.testing.assert_allclose(ours, jnp.broadcast_to(v[:, :30].mean(1, keepdims=True), ours.shape), atol=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_the_kernel_takes_them(precision: Precision, monkeypatch: pytest.MonkeyPatch):
    teach(monkeypatch)
    q, k, v = inputs(queries=70, keys=130)
    rows, numbers = rounded(q, precision)
    config = HopperConfig(warpgroups=1, probabilities="shared" if precision in EIGHT_BIT_VALUES else "registers")
    with interpreted():
        ours, _ = attention_hopper(
            jnp.zeros_like(q), k, v, scale=0.1, precision=precision, config=config, rows=rows._replace(source=None)
        )
        ours = np.asarray(ours, np.float32)
    assert relative(ours, attention(numbers, k, v, scale=0.1, precision=precision, implementation="reference")) < 4e-3


@pytest.mark.slow
def test_gradients_reach_what_was_rounded():
    q, k, v = inputs(9, 30, d=16, dtype=jnp.float32)

    def loss(q, k, v, precision):
        q = quantize_rows(q, "int8") if precision == "int8" else q
        return jnp.sum(jnp.sin(attention(q, k, v, precision=precision)))

    eight_bit = jax.grad(loss, argnums=(0, 1, 2))(q, k, v, "int8")
    for ours, exact in zip(eight_bit, jax.grad(loss, argnums=(0, 1, 2))(q, k, v, "full"), strict=True):
        assert relative(ours, exact) < 0.05


def test_where_no_kernel_is_right_the_floats_are_used(monkeypatch: pytest.MonkeyPatch):
    device = types.SimpleNamespace(compute_capability="9.0", device_kind="GPU of 9.0")
    for module in (choose_hopper, api):
        monkeypatch.setattr(module, "cuda_device", lambda: device)
    monkeypatch.setattr(choose_hopper, "_comparison", lambda precision, config: lambda: 1.0)
    self_check.forget()
    q, k, v = inputs()
    with pytest.warns(RuntimeWarning, match="using attention in full precision instead"):
        ours = attention(quantize_rows(q, "int8"), k, v, precision="int8")
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(attention(q, k, v), np.float32))
    self_check.forget()


@pytest.mark.parametrize("precision", ["full", "e4m3"])
def test_rows_of_another_precision_are_refused(precision: Precision):
    q, k, v = inputs()
    with pytest.raises(UserError, match=f"q is int8 rows, and attention_precision is '{precision}'"):
        attention(quantize_rows(q, "int8"), k, v, precision=precision)


def test_rows_without_what_they_were_made_of_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="without a source"):
        attention(quantize_rows(q, "int8")._replace(source=None), k, v, precision="int8")


def test_on_cuda_the_norm_hands_over_8_bits():
    def attend(x, k, v, cos, sin):
        rows = rmsnorm_rope(x, jnp.ones(x.shape[-1]), 1e-6, (cos, sin), dtype=jnp.int8)
        assert isinstance(rows, QuantizedRows)
        return attention(rows, k, v, precision="int8")

    shapes = [(1, 256, 512), (1, 300, 4, 128), (1, 300, 4, 128)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    tables = [jax.ShapeDtypeStruct((256, 128), jnp.float32)] * 2
    program = lower_for_cuda(attend, *arrays, *tables)
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 2
    made = [line for line in program.splitlines() if line.endswith("-> tensor<1x256x4x128xi8>")]
    assert made and not [line for line in made if "stablehlo.convert" in line]
    assert "tensor<1x300x4x128xi8>" in program  # keys are rounded there
