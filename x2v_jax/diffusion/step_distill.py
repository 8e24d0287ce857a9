"""Sampling of step-distilled models: predict the clean sample, add fresh noise at the next level, repeat.

Source: LightX2V's WanStepDistillScheduler, the consistency form of Luo et al., arXiv:2310.04378. No guidance: the
student has learnt its teacher's. `step` is the formula and `evaluate` the network's answer before it. `steps` repeats
them in a Python loop: unrolled inside one jit, or outside, where progress, previews and cancelling are wanted. `scan`
repeats them in a loop of the program.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from x2v_jax.diffusion.flow import add_noise, timestep_from_sigma, x0_from_velocity
from x2v_jax.diffusion.schedules import step_sigmas

__all__ = ["evaluate", "sample", "scan", "step", "step_sigmas", "steps", "unrolled"]

VelocityFn = Callable[[Array, Array], Array]
# (latents, sigma, next sigma, noise) -> (latents after the step, what else is wanted of it)
type StepFn[Told] = Callable[[Array, Any, Any, Array], tuple[Array, Told]]


def step(
    latents: Float[Array, "*s"],
    velocity: Float[Array, "*s"],
    sigma: ArrayLike,
    next_sigma: ArrayLike = 0.0,
    noise: Float[ArrayLike, "*s"] | None = None,
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


def evaluate(
    velocity_fn: VelocityFn,
    latents: Float[Array, "*s"],
    sigma: ArrayLike,
    next_sigma: ArrayLike,
    noise: Float[ArrayLike, "*s"],
) -> Float[Array, "*s"]:
    """`step` with the network's answer: velocity_fn(latents, timestep scalar) -> velocity.

    Args:
        sigma, next_sigma: scalars, or [2] each: sigma, and the timestep that the network is asked at instead of
            1000 * sigma.
    """
    if jnp.ndim(sigma) == 0:
        timestep = timestep_from_sigma(sigma)
    else:
        (sigma, timestep), next_sigma = jnp.asarray(sigma), jnp.asarray(next_sigma)[0]
    velocity = velocity_fn(latents, jnp.asarray(timestep, jnp.float32))
    return step(latents, velocity, sigma, next_sigma, noise)


def steps[Told](
    step_fn: StepFn[Told],
    noise: Float[Array, "*s"],
    sigmas: Float[ArrayLike, "n *pair"],
    renoise_fn: Callable[[int], Array],
) -> Iterator[tuple[Float[Array, "*s"], Told]]:
    """What each step gives, one after the other.

    Args:
        step_fn: one step, such as `evaluate` with a network.
        noise: the sample at sigmas[0].
        sigmas: from `step_sigmas`; may be traced. [n, 2] with timesteps of their own, see `evaluate`.
        renoise_fn: i -> the noise to add after step i; called for all steps but the last. That one is given the noise
            before it and level 0, which leaves x0 as it is, so that one function serves all steps.
    """
    levels, latents = _with_zero(sigmas), noise
    added: Any = np.broadcast_to(np.float32(0), latents.shape)
    for i in range(len(levels) - 1):
        if i + 2 < len(levels):
            added = renoise_fn(i)
        latents, told = step_fn(latents, levels[i], levels[i + 1], added)
        yield latents, told


def unrolled[Told](
    step_fn: StepFn[Told],
    noise: Float[Array, "*s"],
    sigmas: Float[ArrayLike, "n *pair"],
    renoise_fn: Callable[[int], Array],
) -> tuple[Float[Array, "*s"], Told]:
    """All of `steps`. Returns the clean latents, float32, and what else the steps gave, stacked."""
    latents, told = zip(*steps(step_fn, noise.astype(jnp.float32), sigmas, renoise_fn), strict=True)
    return latents[-1], jax.tree.map(lambda *each: jnp.stack(each), *told)


def scan[Told](
    step_fn: StepFn[Told],
    noise: Float[Array, "*s"],
    sigmas: Float[ArrayLike, "n *pair"],
    renoise_fn: Callable[[Array], Array],
) -> tuple[Float[Array, "*s"], Told]:
    """The same as one loop of the program, whose body is compiled once whatever the number of steps.

    Args:
        renoise_fn: takes a traced i. It is called for the last step too; what it gives then is added at level 0.
    """

    def body(latents: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Told]:
        i, sigma, following = at
        return step_fn(latents, sigma, following, renoise_fn(i))

    levels = jnp.asarray(_with_zero(sigmas))
    return jax.lax.scan(body, noise.astype(jnp.float32), (jnp.arange(len(levels) - 1), levels[:-1], levels[1:]))


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, "*s"],
    sigmas: Sequence[float] | np.ndarray,
    renoise_fn: Callable[[int], Array],
    on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "*s"]:
    """All of `steps` with a network: gradients may pass through some of them.

    Args:
        velocity_fn: (latents, timestep scalar) -> velocity.
        noise, sigmas, renoise_fn: as for `steps`; sigmas are static.
        on_step: called with (i, latents) after step i. Under jit this happens once, while tracing.

    Returns:
        Clean latents, float32.
    """

    def one(latents: Array, *at: Any) -> tuple[Array, None]:
        return evaluate(velocity_fn, latents, *at), None

    latents = start = noise.astype(jnp.float32)
    for i, (latents, _) in enumerate(steps(one, start, np.asarray(sigmas, np.float32), renoise_fn)):
        if on_step is not None:
            on_step(i, latents)
    return latents


def _with_zero(sigmas: ArrayLike) -> Any:
    """The levels of all steps and of what the last one leaves, float32 [n + 1] or [n + 1, 2]."""
    where: Any = jnp if isinstance(sigmas, jax.Array) else np
    levels = where.asarray(sigmas, where.float32)
    if levels.ndim == 1:
        return where.append(levels, where.float32(0))
    return where.concatenate([levels, where.zeros_like(levels[:1])])
