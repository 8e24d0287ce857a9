"""Videos made block by block with a cache, as long as wanted: Self-Forcing and CausVid, by one compiled function.

A block is denoised as a step-distilled model is (predict x0, add noise again), while the network attends to the keys
and values of earlier blocks; then one more pass, over the clean block, leaves in the cache the keys and values that
later blocks attend to.
Sources: Self-Forcing pipeline/causal_inference.py, CausVid causvid/models/wan/causal_inference.py.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from x2v_jax.diffusion import step_distill
from x2v_jax.diffusion.flow import timestep_from_sigma
from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.diffusion.noise import block_noise, step_noise
from x2v_jax.diffusion.rollout_plan import BlockStep, RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import Params, merge
from x2v_jax.models.wan_blocks import CrossKeys

Latents = Float[Array, "b f h w c"]
GivenLatents = Float[Array | np.ndarray, "b f h w c"]
# (block, its shape [B, f, h, w, C]) -> what it starts from, [B, f, h, w, C]
NoiseFn = Callable[[int, tuple[int, ...]], Array]
# (block, number of steps, its shape) -> what is added after each step but the last, [steps - 1, B, f, h, w, C]
RenoiseFn = Callable[[int, int, tuple[int, ...]], Array]
# latent frames before the next new block -> another prompt's cross keys from that block on, or None for no change
ChangeFn = Callable[[int], CrossKeys | None]


class Rollout:
    """A plan for one network and size.

    Every block goes through the same program, `block`: positions, block numbers and the choice between denoising and
    updating the cache with a clean block are its arguments. It is compiled once for each block length, of which there
    are at most two.

    Args:
        graphdef: of a WanModel of `config`, text-to-video.
        latent_size: rows and columns of the latents.
        cache_dtype: what keys and values are kept in; None: as the network computes.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: WanConfig,
        plan: RolloutPlan,
        latent_size: tuple[int, int],
        *,
        batch: int = 1,
        cache_dtype: Any = jnp.bfloat16,
    ):
        if config.in_dim != config.out_dim or config.model_type != "t2v":
            raise UserError(
                f"the checkpoint's model_type is {config.model_type!r} with {config.in_dim} input channels; video "
                "block by block needs a text-to-video model, which can go on from an image given as its first frame"
            )
        if config.patch_size[0] != 1 or any(n % p for n, p in zip(latent_size, config.patch_size[1:], strict=True)):
            raise UserError(
                f"latents of {latent_size} rows and columns do not split into patches of {config.patch_size}"
            )
        rows, columns = (n // p for n, p in zip(latent_size, config.patch_size[1:], strict=True))
        self.config, self.plan, self.batch, self.cache_dtype = config, plan, batch, cache_dtype
        self.latent_size = latent_size
        self.layout = CacheLayout(plan.window, rows * columns, plan.sink, relative=plan.positions == "relative")
        self._graphdef = graphdef
        self.block: Callable[..., tuple[Latents, KVCache]] = jax.jit(self._block, donate_argnames="cache")
        self.prepare = jax.jit(lambda params, text: merge(graphdef, params).cross_keys(text))

    def empty_cache(self) -> KVCache:
        return KVCache.empty(self.config, self.layout, self.batch, self.cache_dtype)

    def shape(self, frames: int) -> tuple[int, ...]:
        return (self.batch, frames, *self.latent_size, self.config.in_dim)

    def stream(
        self,
        params: Params,
        context: CrossKeys,
        noise: NoiseFn,
        renoise: RenoiseFn,
        num_frames: int | None = None,
        *,
        given: GivenLatents | None = None,
        change: ChangeFn | None = None,
    ) -> Iterator[Latents]:
        """Blocks of clean latents [B, f, h, w, C] float32, in order. A block may still be in the making on the device.

        The cache is updated with a block only when the next one is asked for, so that it can be decoded before that.

        Args:
            context: from `prepare(params, text)`, text [B, L, D].
            noise, renoise: what blocks start from and what is added between steps; `keyed_noise` makes both from a key.
            num_frames: length of the video, the given frames included; None: until the caller stops, where the plan's
                mode has no end.
            given: clean latents of the first blocks, e.g. of an image or of an earlier run. They are not yielded again.
            change: asked before each new block. When it gives cross keys, the cache is first recomputed under them from
                the frames that the block will see, clean and block by block, so that the new prompt counts at once
                (LongLive, arXiv:2509.22622). What comes then is what would come if these frames were `given` with the
                new prompt.

        Raises:
            UserError: the plan cannot make num_frames, or `given` is not whole blocks of this size.
        """
        steps = self.plan.steps(num_frames)
        if given is not None:
            self._check_given(given, num_frames)
        return self._stream(_Visits(self, params, context), noise, renoise, steps, given, change)

    def _stream(
        self, visits: "_Visits", noise: NoiseFn, renoise: RenoiseFn, steps: Iterator[BlockStep], given: Any, change: Any
    ) -> Iterator[Array]:
        latents, made = jnp.zeros(()), 0
        visible = _VisibleBlocks(self.plan) if change is not None else None
        # How far positions in the cache are behind the plan's: not at all until the cache is recomputed.
        behind = 0
        for step in steps:
            if step.seed:
                visits.update_cache(latents, step.start_frame, self._context_timestep(False))
                behind = 0
                if visible is not None:
                    visible.restart(latents)
                continue
            is_given = False
            if given is not None and made < given.shape[1]:
                is_given = True
                latents = jnp.asarray(given[:, made : made + step.frames], jnp.float32)
            else:
                if change is not None and visible is not None and (context := change(made)) is not None:
                    visits.context, frames = context, 0
                    for earlier in visible.blocks:
                        visits.update_cache(earlier, frames, np.float32(0))
                        frames += earlier.shape[1]
                    behind = step.start_frame - frames
                shape = self.shape(step.frames)
                added = self._added(renoise, step.block, shape)
                start = jnp.asarray(noise(step.block, shape), jnp.float32)
                latents = visits.denoise(start, step.start_frame - behind, added)
                yield latents
            made += step.frames
            if visible is not None:
                visible.add(latents)
            if is_given or (step.keep and self.plan.context_timestep is not None):
                visits.update_cache(latents, step.start_frame - behind, self._context_timestep(is_given))

    def no_noise(self, shape: tuple[int, ...]) -> Float[Array, "s b f h w c"]:
        """What stands for the noise between steps where none is added."""
        return jnp.zeros((max(1, self.plan.num_steps - 1), *shape), jnp.float32)

    def _added(self, renoise: RenoiseFn, block: int, shape: tuple[int, ...]) -> Array:
        if self.plan.num_steps == 1:
            return self.no_noise(shape)
        return jnp.asarray(renoise(block, self.plan.num_steps, shape), jnp.float32)

    def _context_timestep(self, is_given: bool) -> np.float32:
        """The timestep of a finished block's cache update. Frames that were given are clean, whatever the plan."""
        if is_given:
            return np.float32(0)
        if self.plan.context_timestep is None:
            return np.float32(self.plan.asked_timesteps[-1])
        return np.float32(self.plan.context_timestep)

    def _block(
        self,
        params: Params,
        context: CrossKeys,
        cache: KVCache,
        latents: Latents,
        renoise: Float[Array, "s b f h w c"],
        start_frame: Array,
        first: Array,
        last: Array,
        context_timestep: Array,
    ) -> tuple[Latents, KVCache]:
        """Steps [first, last) of a block at `start_frame`: those of the plan, and after them the clean context pass.

        One loop body is the whole program, so it holds the network once.
        """
        steps = self.plan.num_steps
        sigmas = jnp.asarray((*self.plan.sigmas, 0.0), jnp.float32)
        if self.plan.timesteps is None:
            timesteps = timestep_from_sigma(sigmas).at[steps].set(context_timestep)
        else:
            timesteps = jnp.asarray((*self.plan.timesteps, 0.0), jnp.float32).at[steps].set(context_timestep)
        model = merge(self._graphdef, params)

        def body(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            x, cache = carry
            velocity, cache = model.with_cache(x, jnp.full(x.shape[:1], timesteps[i]), context, cache, start_frame)
            # After the last step the next level is 0, which leaves x0 as it is.
            added = jax.lax.dynamic_index_in_dim(renoise, jnp.minimum(i, len(renoise) - 1), keepdims=False)
            following = step_distill.step(x, velocity, sigmas[i], sigmas[jnp.minimum(i + 1, steps)], added)
            return jnp.where(i < steps, following, x), cache

        return jax.lax.fori_loop(first, last, body, (latents, cache))

    def _check_given(self, given: GivenLatents, num_frames: int | None) -> None:
        frames, expected = given.shape[1], self.shape(given.shape[1])
        if given.shape != expected:
            raise UserError(f"the given latents have shape {given.shape}; {expected} fits this model and size")
        first = 1 if self.plan.independent_first_frame else 0
        if frames < 1 or (frames - first) % self.plan.block:
            raise UserError(
                f"{frames} latent frames are given; this model goes on after "
                f"{'1 frame and ' if first else ''}whole blocks of {self.plan.block}"
            )
        if num_frames is not None and frames >= num_frames:
            raise UserError(f"{frames} latent frames are given and num_frames is {num_frames}; ask for more than that")


class _Visits:
    """The cache of one video, and the calls that change it."""

    def __init__(self, rollout: Rollout, params: Params, context: CrossKeys):
        self.context = context
        self._rollout, self._params = rollout, params
        self._cache = rollout.empty_cache()

    def denoise(self, noise: Latents, start_frame: int, added: Float[Array, "s b f h w c"]) -> Latents:
        return self._block(noise, start_frame, 0, self._rollout.plan.num_steps, added, np.float32(0))

    def update_cache(self, latents: Latents, start_frame: int, timestep: np.float32) -> None:
        """One pass that only leaves keys and values, of a finished block."""
        steps = self._rollout.plan.num_steps
        added = self._rollout.no_noise(latents.shape)
        self._block(latents, start_frame, steps, steps + 1, added, timestep)

    def _block(
        self, latents: Latents, start_frame: int, first: int, last: int, added: Array, timestep: np.float32
    ) -> Latents:
        latents, self._cache = self._rollout.block(
            self._params, self.context, self._cache, latents, added, np.int32(start_frame), np.int32(first),
            np.int32(last), timestep,
        )  # fmt: skip
        return latents


class _VisibleBlocks:
    """The blocks that the next one sees, oldest first: those of the sink, and the latest that fit the window."""

    def __init__(self, plan: RolloutPlan):
        self.blocks: list[Latents] = []
        self._plan = plan

    def restart(self, latents: Latents) -> None:
        self.blocks = [latents]

    def add(self, latents: Latents) -> None:
        self.blocks.append(latents)
        lengths = [block.shape[1] for block in self.blocks]
        in_sink = sum(before < self._plan.sink for before in itertools.accumulate(lengths[:-1], initial=0))
        while self.blocks and sum(block.shape[1] for block in self.blocks) > self._plan.window - self._plan.block:
            del self.blocks[min(in_sink, len(self.blocks) - 1)]


def keyed_noise(key: Key[Array, ""]) -> tuple[NoiseFn, RenoiseFn]:
    """The two noise functions of `Rollout.stream` as functions of a request's key alone."""

    def renoise(block: int, steps: int, shape: tuple[int, ...]) -> Array:
        return draw_between(key, block, steps, shape)

    return lambda block, shape: draw_initial(key, block, shape), renoise


# What `keyed_noise` calls.
draw_initial = jax.jit(block_noise, static_argnames="shape")


def _step_noises(key: Key[Array, ""], block: Array, steps: int, shape: tuple[int, ...]) -> Array:
    return jnp.stack([step_noise(key, step, shape, block) for step in range(steps - 1)])


draw_between = jax.jit(_step_noises, static_argnames=("steps", "shape"))
