"""Distribution matching distillation: a generator of few steps, and a critic that follows it.

With config.causal empty the student makes whole videos (step distillation); with it set, block by block through its
cache (Self-Forcing). Prompts, and for image-to-video first frames, are all the data there is.
Sources: Yin et al., arXiv:2405.14867; Huang et al., arXiv:2506.08009; the recipes of Self-Forcing-Plus.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.diffusion import dmd
from x2v_jax.diffusion.flow import add_noise, velocity_target
from x2v_jax.errors import UserError
from x2v_jax.models.functional import Params, merge

from ..data.continuations import Continuations, open_continuations
from ..data.sources import Batch, Conditions
from ..rollouts import NoisedVideos, sample_keys, velocity_of
from ..shapes.world import turned
from .distillation import Distillation

_Answer = tuple[jax.Array, Params, dict[str, jax.Array]]


class DmdTask(Distillation):
    """Teaches a student of few steps by comparing how a teacher and a critic would denoise its videos.

    Two networks are trained: the generator, which is the student, and the critic, which begins as the teacher and
    follows what the student makes. The teacher stays as it is.

    Fields of the config, besides those of `Distillation`:

    dmd: the loss; fields of `DmdSettings`, or `guidance_scale` as Self-Forcing's configs have it.
    generator_every: the generator is updated once in so many updates of the critic.
    share_batches: whether both learn from the same rows.
    continuation: what a causal student goes on from.
        pairs: a folder that the task ode_pairs made: the ends of its videos are what comes before.
        max_blocks: how many blocks come before, at most.

    Fields of a phase:

    continuation_share: the share of steps in which the student goes on from a video instead of starting one.
    own_share: the share of these in which that video is the student's own.
    own_most: it goes on from a chain of 1 to so many videos of its own.
    """

    roles = ("generator", "critic")

    def __init__(self, config: Any):
        super().__init__(config)
        self.settings = dmd_settings(config.dmd)
        self.critic_graph = self._graph(self.teacher.config("transformer"), config.dtype, config.remat)
        self.teacher_graph = self._graph(self.teacher.config("transformer"), config.teacher_dtype)
        self.variant = "self_forcing" if self.is_causal else "distill"

    @functools.cached_property
    def frozen(self) -> Any:
        frozen = super().frozen | {"teacher": self.load(self.teacher, self.config.teacher_dtype)}
        if any(phase.get("own_share", 0.0) for phase in self.config.phases):
            frozen["vae"] = self.vae.load()
        return frozen

    def init(self, key: jax.Array) -> dict[str, Params]:
        return super().init(key) | {"critic": self.load(self.teacher, "float32")}

    @functools.cached_property
    def continuations(self) -> Continuations:
        """What a causal student goes on from in a share of the steps."""
        settings = self.config.continuation
        if not self.is_causal or not settings.pairs:
            raise UserError(
                "a phase has a continuation_share; it needs a causal student, and in config.continuation.pairs a "
                "folder that ode_pairs made"
            )
        directory = pathlib.Path(self.config.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        follow = turned if self.on_shapes else str
        return open_continuations(settings.pairs, self.teacher, directory, self.shape, follow)

    def updates(self, step: int) -> Sequence[str]:
        return self.roles if step % self.config.generator_every == 0 else ("critic",)

    def batch(self, role: str, step: int, phase: Any) -> Any:
        stream = 0 if self.config.share_batches else self.roles.index(role)
        # What a whole batch shares is drawn here, so that parts of it that are computed apart agree on it.
        rng = np.random.default_rng([self.config.seed, step, self.roles.index(role)])
        if rng.random() < phase.get("continuation_share", 0.0):
            own = int(rng.random() < phase.get("own_share", 0.0))
            most = self.config.continuation.max_blocks
            # The student's own frames fill its window, as they do at inference.
            blocks = most if own else int(rng.integers(1, most + 1))
            if own and phase.get("own_most", 1) > 1:
                own = int(rng.integers(1, phase.own_most + 1))
            frames = blocks * self.config.causal.block
            batch = self.continuations.batch(self.config.seed, step, phase.batch_size, frames, stream, own=own)
        else:
            batch = self.source.batch(self.config.seed, step, phase.batch_size, stream)
        exit_step = rng.integers(len(self.sigmas))
        negative = np.broadcast_to(self.source.negative, batch.conditions.text.shape)
        return {
            "data": batch,
            "negative": negative,
            "exit_step": np.full(phase.batch_size, exit_step, np.int32),
        }

    def gradient(self, role: str, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array) -> _Answer:
        if role == "generator":
            return self._generator_gradient(params, frozen, batch, key)
        return self._critic_gradient(params, frozen, batch, key)

    def _generator_gradient(self, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array) -> _Answer:
        exit_step = batch["exit_step"][0]
        rollout_keys, timestep, noise = self._draw(key, batch["data"].sample)
        weights, to_trained = jax.vjp(lambda trained: self.transformer(trained, frozen), params["generator"])
        data = self._after_own(weights, frozen, batch["data"], key)
        x0, pullback = self.rollout.videos_and_pullback(weights, data, rollout_keys, exit_step)
        scores = self._scores(params["critic"], frozen["teacher"], data.conditions, batch["negative"])
        video = _as_video(x0, data)
        difference = dmd.score_difference(video, noise, timestep, scores, self.settings)
        loss = dmd.dmd_loss(video, difference.gradient)
        gradient = _from_video(difference.gradient, data)
        (grads,) = to_trained(pullback(gradient / gradient.size))
        metrics = {"dmd_gradient": jnp.sqrt(jnp.mean(difference.gradient**2)), "x0_std": jnp.std(x0)}
        return loss, grads, metrics | self._by_exit_step(loss, exit_step)

    def _critic_gradient(self, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array) -> _Answer:
        exit_step = batch["exit_step"][0]
        rollout_keys, timestep, noise = self._draw(key, batch["data"].sample)
        weights = self.transformer(params["generator"], frozen)
        data = self._after_own(weights, frozen, batch["data"], key)
        x0 = _as_video(self.rollout.videos(weights, data, rollout_keys, exit_step), data)
        noisy = add_noise(x0, noise, timestep / 1000)

        def loss_of(critic: Params) -> tuple[jax.Array, jax.Array]:
            velocity = velocity_of(merge(self.critic_graph, critic), noisy, timestep, data.conditions)
            errors = jnp.mean(jnp.square(velocity - velocity_target(x0, noise)), axis=(1, 2, 3, 4))
            return dmd.critic_flow_loss(velocity, x0, noise), errors

        (loss, errors), grads = jax.value_and_grad(loss_of, has_aux=True)(params["critic"])
        return loss, grads, by_timestep(errors, timestep)

    def _after_own(self, weights: Params, frozen: Any, batch: Batch, key: jax.Array) -> Batch:
        """Where something follows: the batch that goes on from the student's own videos instead of the given one."""
        if batch.following is None:
            return batch
        keys = sample_keys(jax.random.fold_in(key, 3), batch.sample)
        vae = merge(self.vae.graphdef, frozen["vae"])

        def conditions(number: jax.Array) -> Conditions:
            return jax.tree.map(lambda a, b: jnp.where(number % 2 == 0, a, b), batch.conditions, batch.following)

        def go_on(number: jax.Array, video: jax.Array) -> jax.Array:
            before = Batch(conditions(number), batch.sample, given=video[:, -batch.given.shape[1] :])
            own_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            return self.rollout.videos(weights, before, own_keys, jnp.int32(len(self.sigmas) - 1))

        # One program for a chain of any length.
        start = jnp.zeros((*batch.given.shape[:1], *self.shape), batch.given.dtype)
        start = start.at[:, -batch.given.shape[1] :].set(batch.given)
        video = jax.lax.stop_gradient(jax.lax.fori_loop(0, batch.own[0], go_on, start))
        # The decoder takes the first of these frames for a picture; that is forgotten long before the last.
        picture = vae.decode(video)[:, -1:]
        return Batch(
            conditions(batch.own[0]),
            batch.sample,
            given=video[:, -batch.given.shape[1] :],
            last_image=jax.lax.stop_gradient(vae.encode(picture)[:, 0]),
        )

    def _scores(self, critic: Params, teacher: Params, conditions: Conditions, negative: jax.Array) -> dmd.Scores:
        real, fake = merge(self.teacher_graph, teacher), merge(self.critic_graph, critic)
        without = conditions._replace(text=negative)

        def score(model: Any, conditions: Conditions) -> dmd.ScoreFn:
            return lambda noisy, timestep: velocity_of(model, noisy, timestep, conditions)

        return dmd.Scores(score(real, conditions), score(fake, conditions), score(real, without), score(fake, without))

    def _draw(self, key: jax.Array, sample: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(keys of the rollouts, timesteps [B] and noise of the scores), by sample."""
        rollout, time, noise = (sample_keys(jax.random.fold_in(key, i), sample) for i in range(3))
        timestep = jax.vmap(lambda key: dmd.sample_timestep(key, 1, self.settings)[0])(time)
        return rollout, timestep, jax.vmap(lambda key: jax.random.normal(key, self.shape))(noise)

    def _by_exit_step(self, loss: jax.Array, exit_step: jax.Array) -> dict[str, jax.Array]:
        return {f"loss_exit_{i}": jnp.where(exit_step == i, loss, jnp.nan) for i in range(len(self.sigmas))}


def _as_video(x0: jax.Array, batch: Batch) -> jax.Array:
    """What the scores are asked about: frames that follow given ones, with the picture before them as first frame.

    The last frame drops out, so that the video has the teacher's length.
    """
    return x0 if batch.given is None else jnp.concatenate([batch.last_image[:, None], x0[:, :-1]], axis=1)


def _from_video(gradient: jax.Array, batch: Batch) -> jax.Array:
    """The derivative in x0 from that in `_as_video` of it."""
    if batch.given is None:
        return gradient
    return jnp.concatenate([gradient[:, 1:], jnp.zeros_like(gradient[:, :1])], axis=1)


def dmd_settings(config: Any) -> dmd.DmdSettings:
    """From a config's `dmd`. `guidance_scale` is Self-Forcing's form, cond + g (cond - uncond): 5 where ours is 6.

    Beside `real_guidance_scale`, which it then replaces, it was given to a config that is in our form otherwise.
    """
    values = {name: value for name, value in config.items() if value is not None}
    if "guidance_scale" in values:
        if "real_guidance_scale" in values:
            return dmd.DmdSettings(**values | {"real_guidance_scale": values.pop("guidance_scale") + 1})
        return dmd.DmdSettings.from_self_forcing(**values)
    return dmd.DmdSettings(**values)


def by_timestep(losses: jax.Array, timestep: jax.Array) -> dict[str, jax.Array]:
    """The mean loss of the samples in each quarter of the timesteps, NaN where there is none. Both are [B]."""
    quarter = jnp.clip(timestep // 250, 0, 3)
    return {f"loss_t_{250 * i}": jnp.mean(losses, where=quarter == i) for i in range(4)}


class CausVidTask(DmdTask):
    """CausVid (Yin et al., arXiv:2412.07772): a causal student learns from real videos with noise on them.

    It never sees its own videos while it learns; Self-Forcing (`DmdTask` with config.causal) mends that. Config as
    `DmdTask`'s, with data that have latents.
    """

    needs_latents = True

    def __init__(self, config: Any):
        super().__init__(config)
        if not self.is_causal:
            raise UserError("config.causal is empty; CausVid's student is causal: set config.causal.block")
        # Evaluation goes on with the cache, as inference does.
        self.rollout = NoisedVideos(self.graph, self.shape, self.sigmas, block=config.causal.block)
        self.variant = "causvid"
