"""The Hopper kernels of 8-bit layers: interpreted against exact sums, and lowered for CUDA at the sizes of Wan2.1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreter import interpreted, lower_for_cuda

from x2v_jax.ops.linear_8bit import QuantizedRows, linear_8bit, quantize_rows, quantize_weight
from x2v_jax.ops.linear_8bit.config import TABLE, WAN_MATRICES, MatmulConfig, config_for, takes
from x2v_jax.ops.linear_8bit.hopper import matmul_hopper
from x2v_jax.ops.linear_8bit.hopper_rows import quantize_rows_hopper, takes_rows, warpgroups

SMALL = MatmulConfig(tile_n=64, stages=2, epilogue_n=32)
INTO_RESIDUAL = MatmulConfig(tile_n=64, stages=2, epilogue_n=16, epilogue_slots=3)
DTYPES = ("int8", "float8_e4m3fn")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def case(dtype, m, n, k, *, bias=False, gate=None, residual=False):
    x = quantize_rows(normal(0, m, k), dtype)._replace(source=None)
    weight, scale = quantize_weight(normal(1, n, k), dtype)
    gates = {"channel": (1, n), "token": (m, n)}
    return (
        x,
        weight,
        scale,
        normal(2, n) if bias else None,
        normal(3, *gates[gate]) if gate else None,
        normal(4, m, n) if residual else None,
    )


def truth(x, weight, scale, bias, gate, residual, gelu):
    y = np.asarray(x.values, np.float64) @ np.asarray(weight, np.float64).T
    y = y * np.asarray(x.scale, np.float64)[:, None] * np.asarray(scale, np.float64)
    y = y if bias is None else y + np.asarray(bias, np.float64)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) if gelu else y
    y = y if gate is None else y * np.asarray(gate, np.float64)
    return y if residual is None else y + np.asarray(residual, np.float64)


# Rows: within a warpgroup's part of a tile, to its end, into the second part, and not a multiple of eight; one and two
# blocks of a cluster have some.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "m", "config", "epilogue", "gelu"),
    [
        ("int8", 128, SMALL, {}, False),
        ("float8_e4m3fn", 192, SMALL, {"bias": True}, False),
        ("int8", 257, SMALL, {"bias": True}, True),
        ("float8_e4m3fn", 136, SMALL, {}, True),
        ("int8", 200, INTO_RESIDUAL, {"residual": True}, False),
        ("int8", 300, dataclasses.replace(INTO_RESIDUAL, cluster=1), {"residual": True}, False),
        ("int8", 136, INTO_RESIDUAL, {"bias": True, "gate": "channel", "residual": True}, False),
        ("float8_e4m3fn", 131, INTO_RESIDUAL, {"bias": True, "gate": "token", "residual": True}, False),
        ("float8_e4m3fn", 136, MatmulConfig(tile_n=64, stages=2, promote=2), {"bias": True}, False),
    ],
)
def test_the_kernel_is_the_layer(dtype, m, config, epilogue, gelu):
    arrays = case(dtype, m, 128, 384, **epilogue)
    exact = truth(*arrays, gelu)
    x, weight, scale, bias, gate, residual = arrays
    activation = "gelu_tanh" if gelu else None
    with interpreted():
        y = matmul_hopper(
            x, weight, scale, bias, activation, gate, residual, jnp.float32, config=config, num_clusters=2
        ).block_until_ready()
    assert y.shape == (m, 128) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("cluster", [1, 2])
def test_peers_hear_of_each_stage_that_they_write_into(cluster):
    """The interpreter plays a copy for a whole cluster as a copy a block, and could not tell."""
    x, weight, scale, *_ = case("int8", 256, 64, 256)
    config = dataclasses.replace(SMALL, cluster=cluster)
    kernel = jax.make_jaxpr(
        lambda *arrays: matmul_hopper(*arrays, None, None, None, None, jnp.float32, config=config, num_clusters=1)
    )(x, weight, scale)
    assert ("collective_axes=('peer',)" in str(kernel)) == ("cluster_barrier" in str(kernel)) == (cluster == 2)


def test_16_bit_results_are_the_rounded_ones():
    arrays = case("int8", 136, 128, 256)
    with interpreted():
        y = matmul_hopper(*arrays[:4], None, None, None, jnp.bfloat16, config=SMALL, num_clusters=1).block_until_ready()
    want = linear_8bit(*arrays[:3], out_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("k", [128, 640])
def test_rings_longer_and_shorter_than_the_sum(k):
    arrays = case("int8", 128, 64, k)
    config = MatmulConfig(tile_n=64, stages=4)
    with interpreted():
        y = matmul_hopper(*arrays[:4], None, None, None, jnp.float32, config=config, num_clusters=3).block_until_ready()
    np.testing.assert_allclose(y, truth(*arrays, False), rtol=1e-6)


def test_rows_of_zeros_and_values_that_are_not_finite():
    x = QuantizedRows(jnp.zeros((128, 128), jnp.int8), jnp.zeros(128).at[3].set(jnp.nan))
    weight, scale = quantize_weight(normal(1, 64, 128), "int8")
    with interpreted():
        y = matmul_hopper(x, weight, scale, None, None, None, None, jnp.float32, config=SMALL, num_clusters=1)
        y = np.asarray(y)
    assert np.isnan(y[3]).all() and not np.delete(y, 3, axis=0).any()


@pytest.mark.parametrize(("width", "groups", "dtype", "sum_of"), [
    (1280, 1, "int8", 1), (1280, 1, "float8_e4m3fn", 2), (13824, 3, "int8", 2), (13824, 3, "float8_e4m3fn", 1)
])  # fmt: skip
def test_rows_are_quantized_as_by_the_reference(width, groups, dtype, sum_of):
    assert warpgroups(width)[0] == groups
    each = jnp.array([1.0, 100.0, 0.0])[:, None]
    x, *plus = ((normal(seed, 3, width) * each).astype(jnp.bfloat16) for seed in range(sum_of))
    with interpreted():
        rows = jax.block_until_ready(quantize_rows_hopper(x, dtype, *plus))
    want = quantize_rows(x, dtype, plus=plus[0] if plus else None, implementation="reference")
    np.testing.assert_array_equal(rows.scale, want.scale)
    np.testing.assert_array_equal(np.asarray(rows.values).view(np.uint8), np.asarray(want.values).view(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rows", "matrices"),
    [("int8", 32760, WAN_MATRICES[:3]), ("float8_e4m3fn", 75600, WAN_MATRICES[3:6]), ("int8", 512, WAN_MATRICES[6:])],
)
def test_every_layer_of_wan_becomes_one_kernel_and_no_product_of_xla(dtype, rows, matrices):
    for n, k in matrices:

        def layer(x, weight, scale, bias):
            return linear_8bit(x, weight, scale, bias, activation="gelu_tanh")

        shapes = [((rows, k), jnp.bfloat16), ((n, k), dtype), ((n,), jnp.float32), ((n,), jnp.float32)]
        program = lower_for_cuda(layer, *(jax.ShapeDtypeStruct(*s) for s in shapes))
        assert program.count("stablehlo.custom_call @mosaic_gpu") == 2  # rows, product
        assert "dot_general" not in program


@pytest.mark.parametrize("gate_rows", [1, 4680])
def test_gate_and_residual_are_in_the_kernel(gate_rows):
    def layer(x, weight, scale, gate, residual):
        return linear_8bit(x, weight, scale, gate=gate, residual=residual, out_dtype=jnp.float32)

    n, rows = 1536, 4680
    shapes = [((1, rows, n), "bfloat16"), ((n, n), "int8"), ((n,), "float32")]
    shapes += [((1, gate_rows, n), "float32"), ((1, rows, n), "float32")]
    program = lower_for_cuda(layer, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 2 and "dot_general" not in program


@pytest.mark.parametrize("change", [{"m": 127}, {"n": 1600}, {"implementation": "xla"}, {"activations": "16bit"}])
def test_what_the_kernel_does_not_take_is_xlas(change):
    change = {"m": 256, "n": 1536} | change
    m, n = change.pop("m"), change.pop("n")
    shapes = [((m, 1536), "bfloat16"), ((n, 1536), "int8"), ((n,), "float32")]
    program = lower_for_cuda(lambda *a: linear_8bit(*a, **change), *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert program.count("stablehlo.dot_general") == 1
    product = next(line for line in program.splitlines() if "stablehlo.dot_general" in line)
    if "activations" in change:
        assert "bf16>, tensor" in product and program.count("custom_call") == 0
    else:
        assert "xi8>, tensor" in product and "xi32>" in product


def test_xla_multiplies_float8_as_float8_on_cuda():
    shapes = [((256, 1600), "bfloat16"), ((1600, 1600), "float8_e4m3fn"), ((1600,), "float32")]
    program = lower_for_cuda(linear_8bit, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    product = next(line for line in program.splitlines() if "stablehlo.dot_general" in line)
    assert product.count("xf8E4M3FN") == 2


def test_the_table_has_tiles_for_every_matrix_and_none_for_others():
    assert all(config_for(n, k, dtype, kind) for n, k, dtype, kind in TABLE)
    assert {(n, k) for n, k, *_ in TABLE} == set(WAN_MATRICES)
    assert all(n % c.tile_n == 0 and k % c.tile_k == 0 for (n, k, *_), c in TABLE.items())
    assert config_for(64, 64, "int8", "plain") is None
    assert takes(128, 1536, 8960) and not takes(127, 1536, 8960) and not takes(4680, 8960, 8960)
    assert takes_rows((2, 80, 5120)) and not takes_rows((2, 80, 5121)) and not takes_rows((2, 8, 5120))


def test_tiles_that_do_not_fit_are_refused():
    x, weight, scale, *_ = case("int8", 128, 96, 128)
    with pytest.raises(ValueError, match="does not fit"):
        matmul_hopper(x, weight, scale, None, None, None, None, jnp.float32, config=SMALL)
