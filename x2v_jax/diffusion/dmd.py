"""Distribution matching distillation: how a student learns from the difference of two scores.

A frozen teacher (real score) and a critic (fake score), which follows the student, are asked about the student's videos
with noise on them. Where they differ is where the student's videos are unlike real ones.
Sources: Yin et al., arXiv:2311.18828 and 2405.14867; Self-Forcing model/dmd.py. All in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from x2v_jax.diffusion.flow import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    guided_velocity,
    shift_sigma,
    timestep_from_sigma,
    velocity_target,
    x0_from_velocity,
)
from x2v_jax.diffusion.schedules import check_shift
from x2v_jax.errors import UserError

# (noisy [B, F, h, w, C], timestep [B]) -> velocity
ScoreFn = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class DmdSettings:
    """Settings of the loss. Guidance scales are in the usual form, uncond + scale (cond - uncond); 1 is no guidance.

    timestep_shift: moves the scores' timesteps towards noise; 1 does not.
    min_timestep, max_timestep: they are clamped to these after the shift.
    """

    real_guidance_scale: float = 6.0
    fake_guidance_scale: float = 1.0
    timestep_shift: float = 5.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0

    def __post_init__(self):
        check_shift(self.timestep_shift)
        # At timestep 0 nothing is left of the noise that the scores are asked about.
        if not 0 < self.min_timestep <= self.max_timestep <= NUM_TRAIN_TIMESTEPS:
            raise UserError(
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep}; give 0 < min <= max <= 1000"
            )

    @classmethod
    def from_self_forcing(cls, guidance_scale: float, fake_guidance_scale: float = 0.0, **others: float) -> Self:
        """Settings with guidance as Self-Forcing's configs have it: cond + scale (cond - uncond), 5 where ours is 6."""
        return cls(real_guidance_scale=guidance_scale + 1, fake_guidance_scale=fake_guidance_scale + 1, **others)


class Scores(NamedTuple):
    """The velocity functions of teacher and critic. An unconditional one may be None where its scale is 1."""

    real: ScoreFn
    fake: ScoreFn
    real_unconditional: ScoreFn | None = None
    fake_unconditional: ScoreFn | None = None


class ScoreDifference(NamedTuple):
    """gradient: of the loss in each element of x0, times their number. The rest is what was asked, for logging."""

    gradient: Float[Array, "b f h w c"]
    timestep: Float[Array, " b"]
    noisy: Float[Array, "b f h w c"]


def score_timestep(nominal: Num[Array, " b"], settings: DmdSettings) -> Float[Array, " b"]:
    """Timesteps in [0, 1000] -> shifted and clamped: what the scores are asked at."""
    sigma = shift_sigma(nominal.astype(jnp.float32) / NUM_TRAIN_TIMESTEPS, settings.timestep_shift)
    return jnp.clip(timestep_from_sigma(sigma), settings.min_timestep, settings.max_timestep)


def sample_timestep(
    key: Key[Array, ""], batch: int, settings: DmdSettings, lowest: int = 0, highest: int = NUM_TRAIN_TIMESTEPS
) -> Float[Array, " b"]:
    """One timestep a sample: uniform over the whole numbers lowest .. highest - 1, then shifted and clamped."""
    return score_timestep(jax.random.randint(key, (batch,), lowest, highest), settings)


def score_difference(
    x0: Float[Array, "b f h w c"],
    noise: Float[Array, "b f h w c"],
    timestep: Float[Array, " b"],
    scores: Scores,
    settings: DmdSettings,
) -> ScoreDifference:
    """(fake x0 - real x0) / mean |x0 - real x0|, the mean over each sample. Constant in x0: no gradient passes.

    Args:
        x0: the student's videos.
        noise: standard normal.
        timestep: from `score_timestep` or `sample_timestep`.
    """
    x0, noise, timestep = jax.lax.stop_gradient((x0, noise, timestep))
    sigma = timestep / NUM_TRAIN_TIMESTEPS
    noisy = add_noise(x0, noise, sigma)

    def clean(score: ScoreFn, unconditional: ScoreFn | None, scale: float, field: str) -> Array:
        velocity = score(noisy, timestep)
        if scale != 1:
            if unconditional is None:
                raise ValueError(f"{field} is {scale}, and there is no unconditional score to guide away from")
            velocity = guided_velocity(unconditional(noisy, timestep), velocity, scale)
        return x0_from_velocity(noisy, velocity, sigma)

    fake = clean(scores.fake, scores.fake_unconditional, settings.fake_guidance_scale, "fake_guidance_scale")
    real = clean(scores.real, scores.real_unconditional, settings.real_guidance_scale, "real_guidance_scale")
    size = jnp.mean(jnp.abs(x0 - real), axis=tuple(range(1, x0.ndim)), keepdims=True)
    # Where x0 is exactly what the teacher says, size is 0 and so is the difference.
    gradient = jax.lax.stop_gradient(jnp.nan_to_num((fake - real) / size))
    return ScoreDifference(gradient, timestep, noisy)


def dmd_loss(
    x0: Float[Array, "b f h w c"], gradient: Float[Array, "b f h w c"], mask: Bool[Array, "b #f"] | None = None
) -> Float[Array, ""]:
    """A loss of value mean(gradient^2) / 2 whose derivative in x0 is gradient / number of elements.

    The published form, mse(x0, constant x0 - gradient) / 2, is the same number; in float32 it would round the gradient
    to the size of x0.

    Args:
        gradient: from `score_difference`.
        mask: [B, F] or [B, 1]; only these frames are learnt from.
    """
    gradient = jax.lax.stop_gradient(gradient.astype(jnp.float32))
    x0 = x0.astype(jnp.float32)
    weight = jnp.ones_like(x0)
    if mask is not None:
        weight = jnp.broadcast_to(mask[..., None, None, None], x0.shape).astype(x0.dtype)
    total = jnp.maximum(weight.sum(dtype=jnp.float32), 1.0)
    value = 0.5 * jnp.sum(gradient**2 * weight) / total
    # The second part is zero, and carries the derivative.
    return value + jnp.sum(gradient * weight * (x0 - jax.lax.stop_gradient(x0))) / total


def critic_flow_loss(
    velocity: Float[Array, "b f h w c"], x0: Float[Array, "b f h w c"], noise: Float[Array, "b f h w c"]
) -> Float[Array, ""]:
    """Flow matching of the critic on the student's videos: mean((velocity - (noise - x0))^2). x0 is constant."""
    target = jax.lax.stop_gradient(velocity_target(x0, noise))
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - target))
