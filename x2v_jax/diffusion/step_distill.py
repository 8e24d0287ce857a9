"""Sampling of step-distilled models: predict the clean sample, add fresh noise at the next level, repeat.

Source: LightX2V's WanStepDistillScheduler, the consistency form of Luo et al., arXiv:2310.04378. No guidance: the
student has learnt its teacher's. One `step` has three drivers: `scan` and `sample`, which unrolls it, inside one jit,
and a loop outside, which calls it jitted alone, where progress, previews and cancelling are wanted.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from x2v_jax.diffusion.flow import add_noise, timestep_from_sigma, x0_from_velocity
from x2v_jax.diffusion.schedules import step_sigmas

__all__ = ["sample", "scan", "step", "step_sigmas"]

VelocityFn = Callable[[Array, Array], Array]


def step(
    latents: Float[Array, "*s"],
    velocity: Float[Array, "*s"],
    sigma: ArrayLike,
    next_sigma: ArrayLike = 0.0,
    noise: Float[Array, "*s"] | None = None,
) -> Float[Array, "*s"]:
    """One denoising step, in float32.

    Args:
        latents: the sample at noise level `sigma`.
        velocity: the network's answer at (latents, 1000 * sigma).
        next_sigma: the level that the next step starts from.
        noise: standard normal; None at the last step, which keeps the clean sample.
    """
    x0 = x0_from_velocity(latents, velocity, sigma)
    return x0 if noise is None else add_noise(x0, noise, next_sigma)


def scan[Told](
    velocity_fn: VelocityFn,
    noise: Float[Array, "*s"],
    sigmas: Float[ArrayLike, " n"],
    renoise_fn: Callable[[Array], Array],
    tell: Callable[[Array], Told],
) -> tuple[Float[Array, "*s"], Told]:
    """All steps as one loop, whose body is compiled once.

    Args:
        velocity_fn, noise: as for `sample`.
        sigmas: from `step_sigmas`; may be traced.
        renoise_fn: traced i -> the noise to add after step i. What it gives after the last one is added at level 0.
        tell: of the latents after a step, what is wanted of them.

    Returns:
        Clean latents, float32, and what `tell` gave, stacked.
    """

    def one(latents: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Told]:
        i, sigma, following = at
        latents = step(latents, velocity_fn(latents, timestep_from_sigma(sigma)), sigma, following, renoise_fn(i))
        return latents, tell(latents)

    sigmas = jnp.asarray(sigmas, jnp.float32)
    levels = (jnp.arange(len(sigmas)), sigmas, jnp.append(sigmas[1:], jnp.float32(0)))
    return jax.lax.scan(one, noise.astype(jnp.float32), levels)


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, "*s"],
    sigmas: Sequence[float] | np.ndarray,
    renoise_fn: Callable[[int], Array],
    on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "*s"]:
    """All steps, unrolled: gradients may pass through some of them.

    Args:
        velocity_fn: (latents, timestep scalar) -> velocity.
        noise: the sample at sigmas[0].
        sigmas: static, from `step_sigmas`.
        renoise_fn: i -> the noise to add after step i; called for all steps but the last.
        on_step: called with (i, latents) after step i. Under jit this happens once, while tracing.

    Returns:
        Clean latents, float32.
    """
    sigmas = np.asarray(sigmas, np.float32)
    latents = noise.astype(jnp.float32)
    for i, sigma in enumerate(sigmas):
        velocity = velocity_fn(latents, jnp.asarray(timestep_from_sigma(sigma), jnp.float32))
        if i + 1 < len(sigmas):
            latents = step(latents, velocity, sigma, sigmas[i + 1], renoise_fn(i))
        else:
            latents = step(latents, velocity, sigma)
        if on_step is not None:
            on_step(i, latents)
    return latents
