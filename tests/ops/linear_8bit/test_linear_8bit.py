"""8-bit linear layers: what they compute, their gradients, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x2v_jax.errors import UserError
from x2v_jax.ops.linear_8bit import QuantizedRows, linear_8bit, quantize_rows, quantize_weight

DTYPES = ("int8", "float8_e4m3fn")
# Of a product of Gaussian rows: rounding both sides in int8, or to the four significant bits of e4m3.
ERROR = {"int8": 0.015, "float8_e4m3fn": 0.05}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def dequantized(weight: jax.Array, scale: jax.Array) -> np.ndarray:
    return np.asarray(weight, np.float32) * np.asarray(scale)[:, None]


def relative(x: jax.Array, y: jax.Array) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@settings(max_examples=12)
@given(
    lead=st.sampled_from([(), (1,), (5,), (2, 3)]),
    n=st.sampled_from([1, 20]),
    k=st.sampled_from([1, 33, 70]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_the_reference_is_the_exact_sum_of_8_bit_products(lead, n, k, dtype, seed):
    rng = np.random.default_rng(seed)
    x = quantize_rows(jnp.asarray(rng.normal(size=(*lead, k)) * 10.0 ** rng.integers(-3, 3), jnp.float32), dtype)
    weight, scale = quantize_weight(jnp.asarray(rng.normal(size=(n, k)), jnp.float32), dtype)
    y = linear_8bit(x, weight, scale, out_dtype=jnp.float32)
    sums = np.asarray(x.values, np.float64) @ np.asarray(weight, np.float64).T
    truth = sums * np.asarray(x.scale, np.float64)[..., None] * np.asarray(scale, np.float64)
    assert y.shape == (*lead, n)
    np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max(initial=0))


def test_int8_sums_are_exact_where_float32_is_not():
    k = 13824
    x = QuantizedRows(jnp.full((1, k), 127, jnp.int8).at[0, 0].set(1), jnp.ones((1,)))
    weight = jnp.full((1, k), 127, jnp.int8)
    y = linear_8bit(x, weight, jnp.full((1,), 2.0**-27), out_dtype=jnp.float32)
    assert float(y[0, 0]) == np.float32((127 * 127 * (k - 1) + 127) * 2.0**-27)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_precisions_of_activations_are_near_the_layer_that_was_quantized(dtype):
    x, w, bias = normal(0, 2, 40, 256), normal(1, 96, 256), normal(2, 96)
    truth = x @ w.T + bias
    weight, scale = quantize_weight(w, dtype)
    in_8 = relative(linear_8bit(x, weight, scale, bias, out_dtype=jnp.float32), truth)
    in_16 = relative(linear_8bit(x, weight, scale, bias, out_dtype=jnp.float32, activations="16bit"), truth)
    assert in_16 < in_8 < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["8bit", "16bit"])
@pytest.mark.parametrize("gate_shape", [(2, 1, 24), (1, 5, 24), (24,)])
def test_every_epilogue_is_that_of_the_layer(dtype, activations, gate_shape):
    x, bias, gate, residual = normal(0, 2, 5, 64), normal(2, 24), normal(3, *gate_shape), normal(4, 2, 5, 24)
    weight, scale = quantize_weight(normal(1, 24, 64), dtype)
    options = {"activations": activations, "out_dtype": jnp.float32}
    plain = linear_8bit(x, weight, scale, **options)
    np.testing.assert_allclose(
        linear_8bit(x, weight, scale, bias, activation="gelu_tanh", **options), jax.nn.gelu(plain + bias), atol=1e-5
    )
    np.testing.assert_allclose(
        linear_8bit(x, weight, scale, bias, gate=gate, residual=residual, **options),
        residual + gate * (plain + bias),
        atol=1e-5,
    )
    assert linear_8bit(x, weight, scale, activations=activations).dtype == jnp.bfloat16


def test_weights_alone_in_8_bits_lose_nothing_in_bfloat16():
    # int8 * scale would not fit bfloat16; int8 does.
    w8 = jnp.arange(-127, 128, dtype=jnp.int8)[:, None]
    scale = jnp.full((255,), 0.1)
    y = linear_8bit(jnp.ones((1, 1), jnp.bfloat16), w8, scale, activations="16bit", out_dtype=jnp.float32)
    np.testing.assert_array_equal(y[0], np.arange(-127, 128, dtype=np.float32) * np.float32(0.1))


@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "hopper"])
def test_every_implementation_is_the_reference_on_a_cpu(implementation):
    x = normal(0, 256, 1536)
    weight, scale = quantize_weight(normal(1, 1536, 1536), "int8")
    want = linear_8bit(x, weight, scale, implementation="reference")
    np.testing.assert_array_equal(linear_8bit(x, weight, scale, implementation=implementation), want)


class TestGradients:
    """Of a layer with frozen 8-bit weights, as LoRA training has it."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activations", ["8bit", "16bit"])
    def test_x_gets_that_of_the_dequantized_layer(self, dtype, activations):
        x, direction = normal(0, 3, 16, 64), normal(1, 3, 16, 32)
        weight, scale = quantize_weight(normal(2, 32, 64), dtype)

        def loss(x):
            return jnp.sum(direction * linear_8bit(x, weight, scale, activations=activations, out_dtype=jnp.float32))

        assert relative(jax.grad(loss)(x), direction @ dequantized(weight, scale)) < 0.005

    @pytest.mark.parametrize("rows", [False, True])
    def test_bias_gate_residual_and_gelu(self, rows):
        x, bias, residual = normal(0, 2, 16, 64), normal(1, 32), normal(2, 2, 16, 32)
        gate, direction = normal(3, 2, 1, 32), normal(4, 2, 16, 32)
        weight, scale = quantize_weight(normal(5, 32, 64) / 8, "int8")

        def ours(x, bias, gate, residual):
            x = quantize_rows(x, "int8") if rows else x
            options = {"activation": "gelu_tanh", "out_dtype": jnp.float32}
            return jnp.sum(direction * linear_8bit(x, weight, scale, bias, gate=gate, residual=residual, **options))

        def exact(x, bias, gate, residual):
            return jnp.sum(direction * (residual + gate * jax.nn.gelu(x @ dequantized(weight, scale).T + bias)))

        arguments = (x, bias, gate, residual)
        ours, exact = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*arguments) for f in (ours, exact))
        for mine, truth in zip(ours, exact, strict=True):
            assert mine.shape == truth.shape and mine.dtype == truth.dtype
            assert relative(mine, truth) < 0.02

    def test_rows_that_several_layers_read_sum_their_gradients(self):
        x = normal(0, 8, 64)
        layers = [quantize_weight(normal(i, 32, 64), "float8_e4m3fn") for i in (1, 2)]

        def loss(x):
            rows = quantize_rows(x, "float8_e4m3fn")
            return sum(jnp.sum(linear_8bit(rows, *layer, out_dtype=jnp.float32)) for layer in layers)

        truth = np.ones((8, 32)) @ sum(dequantized(*layer) for layer in layers)
        assert relative(jax.grad(loss)(x), truth) < 0.005

    def test_they_pass_through_a_scan_over_stacked_layers_with_remat(self):
        x = normal(0, 8, 32)
        weights, scales = quantize_weight(normal(1, 3, 32, 32) / 6, "int8")

        def loss(x):
            def step(x, layer):
                return linear_8bit(quantize_rows(x, "int8"), *layer, residual=x, out_dtype=jnp.float32), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, (weights, scales))[0])

        truth = np.ones((8, 32))
        for weight, scale in reversed(list(zip(weights, scales, strict=True))):
            truth = truth + truth @ dequantized(weight, scale)
        assert relative(jax.jit(jax.grad(loss))(x), truth) < 0.01

    def test_rows_without_a_source_say_that_they_have_none(self):
        rows = quantize_rows(normal(0, 4, 16), "int8")._replace(source=None)
        weight, scale = quantize_weight(normal(1, 8, 16), "int8")
        with pytest.raises(TypeError, match="without a source"):
            jax.grad(lambda bias: linear_8bit(rows, weight, scale, bias).sum())(jnp.zeros(8))

    def test_a_program_without_gradients_does_not_keep_the_source(self):
        weight, scale = quantize_weight(normal(1, 8, 16), "int8")
        rows = quantize_rows(normal(0, 4, 16), "int8")
        program = jax.jit(lambda rows: linear_8bit(rows, weight, scale)).lower(rows).compile().as_text()
        computed = [line for line in program.splitlines() if "f32[4,16]" in line and " = " in line]
        assert all(" parameter(" in line for line in computed)


@pytest.mark.usefixtures("without_type_checks")
class TestRefusals:
    weight, scale = quantize_weight(np.ones((8, 16), np.float32), "int8")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"activation": "relu"}, "activation is 'relu'"),
            ({"activations": "4bit"}, "linear_activations is '4bit'"),
            ({"implementation": "cudnn"}, "linear is 'cudnn'; it must be one of auto, reference, xla, hopper"),
            ({"bias": jnp.zeros(9)}, r"bias has shape \(9,\)"),
            ({"residual": jnp.zeros((2, 9))}, r"residual has shape \(2, 9\)"),
            ({"x": jnp.zeros((2, 15))}, r"x \(2, 15\) does not fit"),
            ({"x": jnp.zeros((2, 16), jnp.int8)}, "x is int8; it must be floats"),
            ({"x": quantize_rows(jnp.ones((2, 16)), "int8"), "activations": "16bit"}, "'16bit' and x is quantized"),
            ({"x": quantize_rows(jnp.ones((2, 16)), "float8_e4m3fn")}, "quantize them alike"),
            ({"weight": jnp.zeros((8, 16), jnp.int4)}, "8-bit dtype is int4; it must be int8 or float8_e4m3fn"),
        ],
    )
    def test_by_name(self, options, said):
        arguments = {"x": jnp.zeros((2, 16)), "weight": jnp.asarray(self.weight), "scale": jnp.asarray(self.scale)}
        with pytest.raises(UserError, match=said):
            linear_8bit(**(arguments | options))
