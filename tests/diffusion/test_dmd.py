"""The loss of distribution matching distillation against its formula, and the distribution of its timesteps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion import dmd
from x2v_jax.errors import UserError

SHAPE = (2, 3, 2, 2, 4)


def _random(seed: int, shape=SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _score(seed: int) -> dmd.ScoreFn:
    matrix = _random(seed, (4, 4))
    return lambda x, t: jnp.tanh(x @ matrix) + t[:, None, None, None, None] / 1000


REAL, FAKE, UNCONDITIONAL, FAKE_UNCONDITIONAL = map(_score, range(4))


def test_the_gradient_is_the_normalised_difference_of_guided_samples():
    settings = dmd.DmdSettings(real_guidance_scale=3.5, fake_guidance_scale=2.0)
    scores = dmd.Scores(REAL, FAKE, UNCONDITIONAL, FAKE_UNCONDITIONAL)
    x0, noise, t = _random(5), _random(6), jnp.array([900.0, 120.0])
    gradient, _, noisy = dmd.score_difference(x0, noise, t, scores, settings)
    s = (t / 1000)[:, None, None, None, None]
    x = (1 - s) * x0 + s * noise
    real, real_u, fake, fake_u = (x - s * f(x, t) for f in (REAL, UNCONDITIONAL, FAKE, FAKE_UNCONDITIONAL))
    real, fake = real_u + 3.5 * (real - real_u), fake_u + 2.0 * (fake - fake_u)
    expected = (fake - real) / jnp.abs(x0 - real).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(noisy, x, rtol=1e-5, atol=1e-6)


def test_guidance_of_self_forcing_is_one_less_than_the_usual_form():
    assert dmd.DmdSettings.from_self_forcing(5.0) == dmd.DmdSettings(real_guidance_scale=6.0, fake_guidance_scale=1.0)
    assert dmd.DmdSettings.from_self_forcing(3.0, 0.5, timestep_shift=8.0).fake_guidance_scale == 1.5


def test_without_guidance_no_unconditional_score_is_asked_and_with_it_one_must_be_there():
    x0, noise, t = _random(5), _random(6), jnp.array([900.0, 120.0])
    dmd.score_difference(x0, noise, t, dmd.Scores(REAL, FAKE), dmd.DmdSettings(1.0, 1.0))
    with pytest.raises(ValueError, match="real_guidance_scale is 6"):
        dmd.score_difference(x0, noise, t, dmd.Scores(REAL, FAKE), dmd.DmdSettings())


def test_a_student_that_is_what_the_teacher_says_has_no_gradient():
    x0, noise, t = _random(5), _random(6), jnp.array([500.0, 500.0])
    exact: dmd.ScoreFn = lambda x, t: noise - x0  # noqa: E731
    at_x0 = dmd.score_difference(jnp.zeros(SHAPE), jnp.zeros(SHAPE), t, dmd.Scores(REAL, REAL), dmd.DmdSettings(1, 1))
    np.testing.assert_array_equal(at_x0.gradient, 0)
    nothing: dmd.ScoreFn = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    zero = dmd.Scores(nothing, nothing)
    np.testing.assert_array_equal(
        dmd.score_difference(jnp.zeros(SHAPE), jnp.zeros(SHAPE), t, zero, dmd.DmdSettings(1, 1)).gradient, 0
    )
    np.testing.assert_allclose(dmd.critic_flow_loss(exact(x0, t), x0, noise), 0, atol=1e-12)


def test_the_loss_has_the_published_value_and_a_gradient_that_is_not_rounded():
    x0, gradient = 1e4 * _random(5), 1e-5 * _random(6)
    loss, derivative = jax.value_and_grad(dmd.dmd_loss)(x0, gradient)
    np.testing.assert_allclose(loss, 0.5 * np.mean(np.float64(gradient) ** 2), rtol=1e-5)
    np.testing.assert_allclose(derivative, gradient / gradient.size, rtol=1e-5)


def test_masked_frames_are_not_learnt_from():
    x0, gradient = _random(5), _random(6)
    mask = jnp.array([[False, True, True], [True, False, True]])
    loss, derivative = jax.value_and_grad(dmd.dmd_loss)(x0, gradient, mask)
    kept = np.asarray(gradient)[np.asarray(mask)]
    np.testing.assert_allclose(loss, 0.5 * np.mean(kept**2), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(derivative)[np.asarray(mask)], kept / kept.size, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(derivative)[~np.asarray(mask)], 0)


def test_no_gradient_passes_through_scores_and_targets():
    noise, t = _random(6), jnp.array([500.0, 500.0])
    scores, settings = dmd.Scores(REAL, FAKE), dmd.DmdSettings(1.0, 1.0)
    through = jax.grad(lambda x0: dmd.score_difference(x0, noise, t, scores, settings).gradient.sum())(_random(5))
    np.testing.assert_array_equal(through, 0)
    np.testing.assert_array_equal(jax.grad(lambda x0: dmd.critic_flow_loss(jnp.ones(SHAPE), x0, noise))(_random(5)), 0)


@pytest.mark.parametrize(("shift", "top", "median"), [(5.0, 0.092, 833), (8.0, 0.14, 889)])
def test_shifted_timesteps_are_distributed_as_published(shift: float, top: float, median: float):
    timesteps = dmd.sample_timestep(jax.random.key(0), 40_000, dmd.DmdSettings(timestep_shift=shift))
    assert float(timesteps.min()) >= 20 and float(timesteps.max()) == 980
    assert float((timesteps == 980).mean()) == pytest.approx(top, abs=0.006)
    assert float(jnp.median(timesteps)) == pytest.approx(median, abs=6)


@pytest.mark.parametrize(
    "fields", [{"timestep_shift": 0.0}, {"min_timestep": 0.0}, {"min_timestep": 990.0}, {"max_timestep": 1001.0}]
)
def test_settings_that_cannot_be_are_refused(fields):
    with pytest.raises(UserError):
        dmd.DmdSettings(**fields)
