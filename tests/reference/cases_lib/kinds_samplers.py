"""Samplers on a made-up velocity: tanh(A x over channels) + b t / 1000."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference.cases_lib.case import Case
from x2v_jax.diffusion import step_distill, unipc
from x2v_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, timestep_from_sigma
from x2v_jax.diffusion.schedules import unipc_schedule


def step_distill_trajectory(case: Case) -> dict[str, Any]:
    """sigmas [S], timesteps [S] and the latents after each step [S,C,F,H,W], all of them unrolled in one jit.

    The last entry is the scanned sampler's, so that both drivers are compared with the record.
    """
    _check_timesteps(case)
    sigmas = step_distill.step_sigmas(
        case.config["denoising_step_list"],
        case.config["sample_shift"],
        warp=case.config.get("warp_denoising_step", True),
    )
    renoise = [_channels_last(noise) for noise in case.inputs["renoise"]]

    @jax.jit
    def sample(noise: jax.Array) -> list[jax.Array]:
        trajectory: list[jax.Array] = []
        step_distill.sample(
            _velocity_fn(case), noise, sigmas, lambda i: renoise[i], lambda i, latents: trajectory.append(latents)
        )
        return trajectory

    noise = _channels_last(case.inputs["noise"])
    given = jnp.stack([*renoise, jnp.zeros_like(noise)])

    @jax.jit
    def scanned(noise: jax.Array) -> jax.Array:
        def one(*at: Any) -> tuple[jax.Array, None]:
            return step_distill.evaluate(_velocity_fn(case), *at), None

        return step_distill.scan(one, noise, sigmas, lambda i: given[i])[0]

    trajectory = [*sample(noise)[:-1], scanned(noise)]
    return {
        "sigmas": sigmas,
        "timesteps": timestep_from_sigma(sigmas),
        "trajectory": np.stack([_channels_first(latents) for latents in trajectory]),
    }


def unipc_trajectory(case: Case) -> dict[str, Any]:
    """sigmas [S+1], timesteps [S] and the latents after each step [S,C,F,H,W], by one step jitted alone.

    The last entry is the scanned sampler's, so that both drivers are compared with the record.
    """
    _check_timesteps(case)
    num_steps, shift = case.config["sampling_steps"], case.config["sample_shift"]
    sigmas, timesteps = unipc_schedule(num_steps, shift)
    table = unipc.unipc_table(num_steps, shift)
    velocity_fn, noise = _velocity_fn(case), _channels_last(case.inputs["noise"])

    @jax.jit
    def step(state: unipc.UniPCState, c: unipc.Coefficients) -> unipc.UniPCState:
        return unipc.step(state, velocity_fn(state.latents, c.timestep), c)

    state, trajectory = unipc.init_state(noise), []
    for i in range(num_steps):
        state = step(state, unipc.coefficients_at(table, i))
        trajectory.append(_channels_first(state.latents))
    trajectory[-1] = _channels_first(jax.jit(lambda noise: unipc.sample(velocity_fn, noise, table))(noise))
    return {"sigmas": sigmas, "timesteps": timesteps, "trajectory": np.stack(trajectory)}


def _velocity_fn(case: Case) -> step_distill.VelocityFn:
    matrix, bias = (jnp.asarray(case.inputs[name], jnp.float32) for name in ("A", "b"))
    return lambda x, t: jnp.tanh(x @ matrix.T) + bias * (t / NUM_TRAIN_TIMESTEPS)


def _check_timesteps(case: Case) -> None:
    if case.config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS) != NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"{case.path}: num_train_timesteps is not {NUM_TRAIN_TIMESTEPS}")


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), 0, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 0)
