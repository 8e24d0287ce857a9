"""Rectified flow: x_t = (1 - sigma) x0 + sigma noise, and the network's velocity = noise - x0. All in float32.

`sigma` is a scalar or has leading axes of the sample: [B], or [B, F] where each frame has its own noise level.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from x2v_jax.diffusion.schedules import NUM_TRAIN_TIMESTEPS, shift_sigma, timestep_from_sigma

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "add_noise",
    "guided_velocity",
    "shift_sigma",
    "timestep_from_sigma",
    "velocity_from_x0",
    "velocity_target",
    "x0_from_velocity",
]


def add_noise(x0: Float[Array, "*s"], noise: Float[ArrayLike, "*s"], sigma: ArrayLike) -> Float[Array, "*s"]:
    """x_t = (1 - sigma) * x0 + sigma * noise."""
    sigma = _along(sigma, x0)
    return (1.0 - sigma) * _f32(x0) + sigma * _f32(noise)


def x0_from_velocity(x: Float[Array, "*s"], velocity: Float[Array, "*s"], sigma: ArrayLike) -> Float[Array, "*s"]:
    """The clean sample that a velocity at x_t points to: x0 = x_t - sigma * velocity."""
    return _f32(x) - _along(sigma, x) * _f32(velocity)


def velocity_from_x0(x: Float[Array, "*s"], x0: Float[Array, "*s"], sigma: ArrayLike) -> Float[Array, "*s"]:
    """The inverse of `x0_from_velocity`: (x_t - x0) / sigma. sigma must not be 0."""
    return (_f32(x) - _f32(x0)) / _along(sigma, x)


def velocity_target(x0: Float[Array, "*s"], noise: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """What flow matching regresses to: dx_t / dsigma = noise - x0."""
    return _f32(noise) - _f32(x0)


def guided_velocity(
    unconditional: Float[Array, "*s"], conditional: Float[Array, "*s"], guidance_scale: ArrayLike
) -> Float[Array, "*s"]:
    """Classifier-free guidance: v_u + scale * (v_c - v_u). Scale 1 is the conditional velocity, 0 the other one."""
    unconditional = _f32(unconditional)
    return unconditional + jnp.asarray(guidance_scale, jnp.float32) * (_f32(conditional) - unconditional)


def _f32(x: ArrayLike) -> Array:
    return jnp.asarray(x, jnp.float32)


def _along(sigma: ArrayLike, x: Array) -> Array:
    """sigma in float32 with axes of size 1 behind it, so that it meets the leading axes of x."""
    sigma = jnp.asarray(sigma, jnp.float32)
    if sigma.shape != x.shape[: sigma.ndim]:
        raise ValueError(f"sigma of shape {sigma.shape} does not lead a sample of shape {x.shape}")
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
