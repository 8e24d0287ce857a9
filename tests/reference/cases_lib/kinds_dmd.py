"""Distribution matching distillation on made-up scores: v = tanh(A x over channels) + b t / 1000."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference.cases_lib.case import Case
from x2v_jax.diffusion import dmd
from x2v_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS

_KEYS = {
    "real_guidance_scale", "fake_guidance_scale", "timestep_shift", "min_timestep", "max_timestep", "real_x0", "score",
}  # fmt: skip
_SCORE = "v = tanh(A x over channels) + b t/1000; x0 = x - sigma v"
# The formula of the guided sample -> what its scale is short of the usual one's.
_FORMS = {"cond + g * (cond - uncond)": 1.0, "uncond + g * (cond - uncond)": 0.0}


def dmd_loss(case: Case) -> dict[str, Any]:
    """The scores' timesteps, the noisy sample, the loss and its gradient in x0, and the critic's loss."""
    settings = _settings(case)
    x0, noise = (_channels_last(case.inputs[name]) for name in ("x0", "noise"))
    real, fake = _score(case, "real_cond"), _score(case, "fake_cond")
    scores = dmd.Scores(
        real,
        fake,
        _score(case, "real_uncond") if settings.real_guidance_scale != 1 else None,
        _score(case, "fake_uncond") if settings.fake_guidance_scale != 1 else None,
    )
    timestep = dmd.score_timestep(jnp.asarray(case.inputs["uniform_timestep"]), settings)

    @jax.jit
    def compute(x0: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        difference = dmd.score_difference(x0, noise, timestep, scores, settings)
        loss, gradient = jax.value_and_grad(dmd.dmd_loss)(x0, difference.gradient)
        critic = dmd.critic_flow_loss(fake(difference.noisy, timestep), x0, noise)
        return difference.noisy, loss, gradient, critic

    noisy, loss, gradient, critic = compute(x0, noise)
    return {
        "timestep": timestep,
        "sigma": timestep / NUM_TRAIN_TIMESTEPS,
        "noisy": _channels_first(noisy),
        "loss": loss,
        "loss_gradient": _channels_first(gradient),
        "critic_flow_loss": critic,
    }


def _settings(case: Case) -> dmd.DmdSettings:
    config = case.config
    if unknown := set(config) - _KEYS:
        raise ValueError(
            f"{case.path}: config has {', '.join(sorted(unknown))}, which kind {case.kind!r} does not know"
        )
    if config["score"] != _SCORE:
        raise ValueError(f"{case.path}: score is {config['score']!r}; only {_SCORE!r} is computed")
    if config["real_x0"] not in _FORMS:
        raise ValueError(f"{case.path}: real_x0 is {config['real_x0']!r}; known are {', '.join(map(repr, _FORMS))}")
    return dmd.DmdSettings(
        real_guidance_scale=config["real_guidance_scale"] + _FORMS[config["real_x0"]],
        # Self-Forcing writes the critic's scale as what is added to the conditional sample.
        fake_guidance_scale=config["fake_guidance_scale"] + 1.0,
        # Self-Forcing shifts towards noise or not at all.
        timestep_shift=max(1.0, config["timestep_shift"]),
        min_timestep=config["min_timestep"],
        max_timestep=config["max_timestep"],
    )


def _score(case: Case, name: str) -> dmd.ScoreFn:
    matrix, bias = (jnp.asarray(case.inputs[f"{part}_{name}"], jnp.float32) for part in ("A", "b"))

    def velocity(x: jax.Array, timestep: jax.Array) -> jax.Array:
        return jnp.tanh(x @ matrix.T) + bias * (timestep / NUM_TRAIN_TIMESTEPS)[:, None, None, None, None]

    return velocity


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), 2, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 2)
