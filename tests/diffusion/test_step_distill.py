import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion import step_distill
from x2v_jax.diffusion.noise import initial_noise, step_noise

SIGMAS = step_distill.step_sigmas((1000, 750, 500, 250), 5.0)
START = jnp.asarray([1, -0.5, 0.25, 2], jnp.float32)
FIXED_NOISE = jnp.asarray([0.3, -1.2, 0.7, 0.1], jnp.float32)
# Recorded from LightX2V's WanStepDistillScheduler with velocity 0.5 x + 0.001 t and the noise above.
PUBLISHED = np.array(
    [
        [0.25, -1.203125, 0.6015625, 0.09375],
        [0.125651, -1.2530111, 0.4901123, -0.0548503],
        [-0.0454305, -1.2845129, 0.2842954, -0.2099152],
        [-0.4218584, -1.2737277, -0.1951719, -0.5349417],
    ]
)


def toy_velocity(x, t):
    return 0.5 * x + 0.001 * t


def curved_velocity(x, t):
    return jnp.tanh(x @ (jnp.eye(x.shape[-1]) + 0.1)) + t / 1000


def test_every_step_matches_the_published_numbers():
    trajectory = []
    step_distill.sample(toy_velocity, START, SIGMAS, lambda i: FIXED_NOISE, lambda i, x: trajectory.append(x))
    for latents, published in zip(trajectory, PUBLISHED, strict=True):
        np.testing.assert_allclose(latents, published, rtol=1e-6, atol=1e-6)


def test_one_step_model_returns_its_x0():
    latents = step_distill.sample(
        toy_velocity, START, SIGMAS[:1], lambda i: pytest.fail("no noise after the last step")
    )
    np.testing.assert_allclose(latents, START - toy_velocity(START, 1000.0), rtol=1e-6)


def test_unrolled_in_one_jit_and_driven_from_outside_agree():
    key, shape = jax.random.key(1), (1, 3, 4, 4, 16)
    noise = initial_noise(key, shape)
    whole = jax.jit(
        lambda key: step_distill.sample(curved_velocity, noise, SIGMAS, lambda i: step_noise(key, i, shape))
    )(key)

    one_step, velocity = jax.jit(step_distill.step), jax.jit(curved_velocity)
    latents = noise
    for i, sigma in enumerate(SIGMAS):
        v = velocity(latents, jnp.float32(1000 * sigma))
        if i + 1 < len(SIGMAS):
            latents = one_step(latents, v, sigma, SIGMAS[i + 1], step_noise(key, i, shape))
        else:
            latents = one_step(latents, v, sigma)
    np.testing.assert_allclose(latents, whole, rtol=0, atol=2e-6)
    # One program for the steps that add noise, one for the last.
    assert one_step._cache_size() == 2


def test_velocity_is_asked_at_unrounded_timesteps():
    seen = []

    def velocity(x, t):
        assert t.dtype == jnp.float32 and t.shape == ()
        seen.append(float(t))
        return x

    step_distill.sample(velocity, START, SIGMAS, lambda i: FIXED_NOISE)
    np.testing.assert_allclose(seen, [1000, 937.5, 833.3333, 625], rtol=1e-7)


def test_noise_is_asked_for_once_a_step_and_steps_are_reported_in_order():
    asked, reported = [], []
    step_distill.sample(
        toy_velocity, START, SIGMAS, lambda i: (asked.append(i), FIXED_NOISE)[1], lambda i, x: reported.append(i)
    )
    assert asked == [0, 1, 2] and reported == [0, 1, 2, 3]


def test_latents_stay_float32_under_a_bfloat16_network():
    latents = step_distill.sample(
        lambda x, t: toy_velocity(x, t).astype(jnp.bfloat16), START.astype(jnp.bfloat16), SIGMAS, lambda i: FIXED_NOISE
    )
    assert latents.dtype == jnp.float32
