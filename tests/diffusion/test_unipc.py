import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion import unipc
from x2v_jax.errors import UserError

START = jnp.asarray([1, -0.5, 0.25, 2], jnp.float32)
# Recorded from Wan2.1's FlowUniPCMultistepScheduler with velocity 0.5 x + 0.001 t.
PUBLISHED = {
    (5, 5.0): [
        [0.9285789, -0.5356867, 0.1964461, 1.9047561],
        [0.8316041, -0.5818542, 0.1248749, 1.7739096],
        [0.693797, -0.6416288, 0.0260841, 1.5840809],
        [0.4840697, -0.7147543, -0.1153423, 1.2832859],
        [0.0415187, -0.8244838, -0.3914825, 0.6188537],
    ],
    (3, 8.0): [
        [0.9117619, -0.5440896, 0.1838361, 1.8823295],
        [0.7184625, -0.6354361, 0.0415131, 1.6210614],
        [-0.2078443, -1.020346, -0.6140952, 0.3338234],
    ],
}


def toy_velocity(x, t):
    return 0.5 * x + 0.001 * t


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_every_step_matches_the_published_numbers(case):
    table = unipc.unipc_table(*case)
    state = unipc.init_state(START)
    for i, published in enumerate(PUBLISHED[case]):
        c = unipc.coefficients_at(table, i)
        state = unipc.step(state, toy_velocity(state.latents, c.timestep), c)
        np.testing.assert_allclose(state.latents, published, rtol=1e-6, atol=3e-7)


def test_scanned_sampler_and_jitted_step_agree_and_compile_once():
    table = unipc.unipc_table(8, 5.0)
    noise = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 16))
    velocity = jax.jit(lambda x, t: jnp.tanh(2 * x) + t / 1000)
    one_step = jax.jit(unipc.step, donate_argnums=0)
    state = unipc.init_state(noise)
    for i in range(8):
        c = unipc.coefficients_at(table, i)
        state = one_step(state, velocity(state.latents, c.timestep), c)
    whole = jax.jit(lambda noise: unipc.sample(velocity, noise, table))(noise)
    np.testing.assert_allclose(state.latents, whole, rtol=0, atol=5e-6)
    assert one_step._cache_size() == 1 and velocity._cache_size() == 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_an_exact_x0_prediction_arrives_at_it(num_steps, shift):
    target = jnp.asarray([0.5, -2.0, 3.0, 0.0])
    table = unipc.unipc_table(num_steps, shift)
    sigmas = jnp.asarray(table.sigma)

    def velocity(x, t):
        return (x - target) / sigmas[jnp.argmin(jnp.abs(jnp.asarray(table.timestep) - t))]

    np.testing.assert_allclose(unipc.sample(velocity, START, table), target, atol=1e-5)


def test_constant_velocity_is_followed_exactly():
    # x0 = x - sigma v is then the same from every noise level, so order, corrector and truncation must all cancel.
    table = unipc.unipc_table(6, 5.0)
    latents = unipc.sample(lambda x, t: jnp.full_like(x, 0.7), START, table)
    np.testing.assert_allclose(latents, START - 0.7 * table.sigma[0], atol=1e-6)


def test_more_steps_come_closer_to_the_ordinary_differential_equation_at_second_order():
    # dx/dsigma = cos(3 sigma) x has a solution in closed form to compare with.
    def error(num_steps):
        table = unipc.unipc_table(num_steps, 3.0)
        state = unipc.init_state(START)
        for i in range(num_steps):
            c = unipc.coefficients_at(table, i)
            state = unipc.step(state, jnp.cos(3 * c.sigma) * state.latents, c)
        exact = START * np.exp(-np.sin(3 * table.sigma[0]) / 3)
        return float(jnp.abs(state.latents - exact).max())

    assert error(40) < error(20) / 3 and error(40) < 0.02


def test_state_is_a_pytree_of_float32():
    state = unipc.init_state(START.astype(jnp.bfloat16))
    assert len(jax.tree.leaves(state)) == 4
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    table = unipc.unipc_table(2, 5.0)
    assert all(column.dtype == np.float32 and column.shape == (2,) for column in table)


def test_weights_of_a_step_sum_to_what_a_constant_sample_needs():
    # Where x, m0, m1 and m_new all equal one constant x0 and there is no noise, x_t = alpha x0.
    table = unipc.unipc_table(10, 5.0)
    alpha = 1 - table.sigma.astype(np.float64)
    for i in range(1, 10):
        c = unipc.coefficients_at(table, i)
        corrected = c.correct_last * alpha[i - 1] + c.correct_new + c.correct_m0 + c.correct_m1
        assert corrected == pytest.approx(alpha[i], abs=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        unipc.unipc_table(0, 5.0)
    with pytest.raises(UserError, match="shift is -1"):
        unipc.unipc_table(5, -1.0)
