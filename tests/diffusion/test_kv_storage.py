"""Keys and values in 8 bits: how near, at what size, and that nothing becomes anything but a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion.kv_storage import EightBit, restore, storage_dtypes, store
from x2v_jax.errors import UserError


def _heavy_tailed(seed: int) -> jax.Array:
    """Student's t with 3 degrees of freedom, and some channels ten times the others."""
    x = jax.random.t(jax.random.key(seed), 3.0, (200, 4, 128))
    return x.at[..., :3].multiply(10.0)


def _error(x: jax.Array, dtype) -> float:
    return float(jnp.linalg.norm(restore(store(x, dtype), jnp.float32) - x) / jnp.linalg.norm(x))


def test_int8_is_within_half_a_step_of_every_number():
    x = _heavy_tailed(0)
    error = jnp.abs(restore(store(x, jnp.int8), jnp.float32) - x)
    half_a_step = jnp.abs(x).max(-1, keepdims=True) / 127 / 2
    assert bool((error <= half_a_step * 1.001).all())


@pytest.mark.parametrize(
    ("dtype", "normal", "heavy_tailed"), [(jnp.int8, 0.008, 0.025), (jnp.float8_e4m3fn, 0.03, 0.03)]
)
def test_the_error_is_as_stated(dtype, normal: float, heavy_tailed: float):
    assert _error(jax.random.normal(jax.random.key(1), (200, 4, 128)), dtype) < normal
    assert _error(_heavy_tailed(1), dtype) < heavy_tailed


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 3e4, 1e30])
def test_the_largest_number_comes_back_and_all_are_finite(dtype, size: float):
    x = size * jnp.concatenate([jnp.ones((1, 1, 64)), -jnp.linspace(0, 1, 64)[None, None]], -1)
    back = restore(store(x, dtype), jnp.float32)
    assert bool(jnp.isfinite(back).all())
    np.testing.assert_allclose(back[..., 0], x[..., 0], rtol=1e-6)


def test_what_is_stored_again_is_the_same():
    once = store(_heavy_tailed(2), jnp.int8)
    again = store(restore(once, jnp.float32), jnp.int8)
    assert isinstance(once, EightBit) and isinstance(again, EightBit)
    np.testing.assert_array_equal(again.numbers, once.numbers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float16", jnp.dtype("bfloat16")])
def test_floating_point_is_kept_as_it_is(dtype):
    assert storage_dtypes(dtype) == (jnp.dtype(dtype), jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", jnp.int32, "float"])
def test_other_types_are_refused_with_those_that_are_taken(dtype):
    with pytest.raises(UserError, match=r"choose 'float32', 'bfloat16', 'float16', 'int8', 'int8_e4m3'"):
        storage_dtypes(dtype)
