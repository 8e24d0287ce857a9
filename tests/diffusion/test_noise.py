import itertools

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.diffusion.noise import initial_noise, step_noise

SHAPE = (3, 4, 4, 16)


def test_noise_is_standard_normal_float32():
    draw = initial_noise(jax.random.key(0), (64, 32, 32))
    assert draw.dtype == jnp.float32 and draw.shape == (64, 32, 32)
    assert abs(float(draw.mean())) < 0.02 and abs(float(draw.std()) - 1) < 0.02


def test_a_requests_noise_does_not_depend_on_other_draws():
    key = jax.random.key(7)
    alone = step_noise(key, 2, SHAPE, block=1)
    initial_noise(jax.random.key(8), SHAPE)
    for step, block in itertools.product(range(3), range(3)):
        step_noise(key, 2 - step, SHAPE, block=2 - block)
    np.testing.assert_array_equal(step_noise(key, 2, SHAPE, block=1), alone)
    np.testing.assert_array_equal(initial_noise(key, SHAPE), initial_noise(key, SHAPE))


def test_every_step_block_and_request_has_noise_of_its_own():
    draws = []
    for seed in (0, 1):
        key = jax.random.key(seed)
        draws.append(initial_noise(key, (8,)))
        draws += [step_noise(key, step, (8,), block=block) for step in range(5) for block in range(5)]
    flat = np.stack(draws)
    assert len(np.unique(flat)) == flat.size


def test_block_zero_is_the_default():
    key = jax.random.key(3)
    np.testing.assert_array_equal(step_noise(key, 1, SHAPE), step_noise(key, 1, SHAPE, block=0))


def test_traced_indices_give_the_same_noise_from_one_compilation():
    key = jax.random.key(5)
    compiled = jax.jit(lambda step, block: step_noise(key, step, SHAPE, block=block))
    for step, block in ((0, 0), (3, 1), (1, 3)):
        np.testing.assert_array_equal(compiled(step, block), step_noise(key, step, SHAPE, block=block))
    assert compiled._cache_size() == 1
