import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion import flow


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, 3, 4, 4, 5)), jnp.float32) for _ in range(2))


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise():
    sigma = np.linspace(0, 1, 11)
    shifted = flow.shift_sigma(sigma, 5.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > sigma[1:-1]).all() and (np.diff(shifted) > 0).all()
    np.testing.assert_array_equal(flow.shift_sigma(sigma, 1.0), sigma)


def test_shift_takes_floats_and_traced_arrays():
    assert flow.shift_sigma(0.75, 5.0) == pytest.approx(0.9375)
    traced = jax.jit(lambda s: flow.timestep_from_sigma(flow.shift_sigma(s, 5.0)))(jnp.float32(0.5))
    np.testing.assert_allclose(traced, 833.3333, rtol=1e-7)


@pytest.mark.parametrize("sigma", [0.3, [0.2, 0.9], [[0.1, 0.5, 1.0], [0.4, 0.6, 0.8]]], ids=["one", "batch", "frames"])
def test_velocity_and_x0_are_two_views_of_the_same_prediction(pair, sigma):
    x0, noise = pair
    sigma = jnp.asarray(sigma)
    x = flow.add_noise(x0, noise, sigma)
    np.testing.assert_allclose(flow.x0_from_velocity(x, flow.velocity_target(x0, noise), sigma), x0, atol=2e-6)
    velocity = flow.velocity_from_x0(x, x0, sigma)
    np.testing.assert_allclose(flow.x0_from_velocity(x, velocity, sigma), x0, atol=2e-6)
    np.testing.assert_allclose(velocity, flow.velocity_target(x0, noise), atol=1e-5)


def test_sigma_of_a_frame_touches_only_that_frame(pair):
    x0, noise = pair
    x = flow.add_noise(x0, noise, jnp.asarray([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    np.testing.assert_array_equal(x[0, 1], noise[0, 1])
    np.testing.assert_array_equal(x[1, 2], noise[1, 2])
    np.testing.assert_array_equal(x[0, 0], x0[0, 0])


def test_sigma_that_matches_no_leading_axes_is_refused(pair):
    x0, noise = pair
    with pytest.raises(ValueError, match=r"\(3,\) does not lead"):
        flow.add_noise(x0, noise, jnp.ones(3))


def test_arithmetic_is_float32_whatever_comes_in(pair):
    x0, noise = (a.astype(jnp.bfloat16) for a in pair)
    for result in (
        flow.add_noise(x0, noise, 0.1),
        flow.x0_from_velocity(x0, noise, 0.1),
        flow.velocity_from_x0(x0, noise, 0.1),
        flow.velocity_target(x0, noise),
        flow.guided_velocity(x0, noise, 5.0),
    ):
        assert result.dtype == jnp.float32


def test_guidance_scale_one_is_conditional_and_zero_unconditional(pair):
    unconditional, conditional = pair
    np.testing.assert_allclose(flow.guided_velocity(unconditional, conditional, 1.0), conditional, atol=1e-6)
    np.testing.assert_array_equal(flow.guided_velocity(unconditional, conditional, 0.0), unconditional)
    expected = np.asarray(unconditional, np.float64) + 5.0 * (np.float64(conditional) - np.float64(unconditional))
    np.testing.assert_allclose(flow.guided_velocity(unconditional, conditional, 5.0), expected, atol=1e-5)
