"""A student makes videos while it is trained, and its gradient goes through one step of each.

Denoising stops at a random step, whose output is what the loss sees; only the network's evaluation at that step is
differentiated. Steps before it, and what earlier blocks left in the cache, are constant.
Sources: Yin et al., arXiv:2405.14867 (backward simulation); Huang et al., arXiv:2506.08009 (Self-Forcing).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from x2v_jax.diffusion.flow import add_noise, timestep_from_sigma, x0_from_velocity
from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.diffusion.noise import block_noise, initial_noise, step_noise
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import Params, merge

from .data.sources import Batch, Conditions

Latents = Float[Array, "b f h w c"]
# The derivative of a loss in the student's videos -> its derivative in the student's parameters.
Pullback = Callable[[Latents], Params]
Keys = Key[Array, " b"]

# Apart from the folds of diffusion.noise.
_LEVELS = 1000


class Rollout(Protocol):
    """How a student makes a batch of videos of a fixed size."""

    sigmas: tuple[float, ...]

    def videos(self, params: Params, batch: Batch, keys: Keys, exit_step: Int[Array, ""]) -> Latents:
        """x0 as of step `exit_step` (the last one makes a finished video). No gradient passes."""
        ...

    def videos_and_pullback(
        self, params: Params, batch: Batch, keys: Keys, exit_step: Int[Array, ""]
    ) -> tuple[Latents, Pullback]:
        """The same videos, and the way back."""
        ...


def sample_keys(key: Key[Array, ""], sample: Int[Array, " b"]) -> Keys:
    """A key for each sample of a batch: its noise does not depend on which others are computed with it."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sample)


def velocity_of(model: Any, latents: Latents, timestep: Array, conditions: Conditions) -> Latents:
    """A whole-video network's velocity; timestep: scalar or [B]."""
    timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), latents.shape[:1])
    if conditions.image_latents is not None:
        latents = jnp.concatenate([latents, conditions.image_latents], axis=-1)
    return model(latents, timestep, conditions.text, conditions.image_features)


class WholeVideo:
    """A bidirectional student.

    Args:
        graphdef: of its WanModel.
        shape: [f, h, w, C] of a video's latents.
        sigmas: falling noise levels of its steps.
    """

    def __init__(self, graphdef: nnx.GraphDef, shape: tuple[int, ...], sigmas: tuple[float, ...]):
        self._graphdef, self._shape, self.sigmas = graphdef, shape, sigmas

    def videos(self, params: Params, batch: Batch, keys: Keys, exit_step: Array) -> Latents:
        params, conditions = jax.lax.stop_gradient(params), batch.conditions
        return self._clean(params, conditions, self._input(params, conditions, keys, exit_step), exit_step)

    def videos_and_pullback(
        self, params: Params, batch: Batch, keys: Keys, exit_step: Array
    ) -> tuple[Latents, Pullback]:
        conditions = batch.conditions
        noisy = jax.lax.stop_gradient(self._input(jax.lax.stop_gradient(params), conditions, keys, exit_step))
        x0, pull = jax.vjp(lambda params: self._clean(params, conditions, noisy, exit_step), params)
        return x0, lambda gradient: pull(gradient)[0]

    def _input(self, params: Params, conditions: Conditions, keys: Keys, exit_step: Array) -> Latents:
        """What the exit step is given."""
        sigmas = jnp.asarray(self.sigmas, jnp.float32)

        def step(i: Array, x: Latents) -> Latents:
            noise = jax.vmap(lambda key: step_noise(key, i, self._shape))(keys)
            return add_noise(self._clean(params, conditions, x, i), noise, _levels(sigmas[i + 1], x))

        start = jax.vmap(lambda key: initial_noise(key, self._shape))(keys)
        return jax.lax.fori_loop(0, exit_step, step, start)

    def _clean(self, params: Params, conditions: Conditions, x: Latents, step: Array) -> Latents:
        sigma = jnp.asarray(self.sigmas, jnp.float32)[step]
        velocity = velocity_of(merge(self._graphdef, params), x, timestep_from_sigma(sigma), conditions)
        return x0_from_velocity(x, velocity, _levels(sigma, x))


class _Tape(NamedTuple):
    """What a rollout leaves for its gradient, by block; given blocks come first and have no `noisy`.

    noisy: what the exit step was given, [new blocks, B, f, h, w, C]. keys, values: as the block left them in the cache,
    [blocks, layers, B, rows, H, D].
    """

    noisy: Array
    keys: Array
    values: Array


class BlockByBlock:
    """A causal student with its cache, as at inference: a block is denoised, then the cache is updated with it.

    A gradient is taken in two passes. The first rolls out and keeps the input of each block's exit step and what the
    block left in the cache; the second evaluates those steps again, one block at a time, against what the blocks before
    left. So activations are those of one block, and no history of the cache is kept.

    Args:
        graphdef: of its WanModel, text-to-video.
        config: of the same.
        shape: [f, h, w, C] of the latents that are made; f is whole blocks.
        sigmas: falling noise levels of its steps.
        block: frames made together.
        window: frames that a block sees, itself included, in whole blocks; None for f.
        context_timestep: of a finished block's cache update.
        cache_dtype: of keys and values.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: WanConfig,
        shape: tuple[int, ...],
        sigmas: tuple[float, ...],
        *,
        block: int,
        window: int | None = None,
        context_timestep: float = 0.0,
        cache_dtype: Any = jnp.float32,
    ):
        self._graphdef, self._config, self._shape, self.sigmas = graphdef, config, shape, sigmas
        self._block, self._context_timestep, self._cache_dtype = block, context_timestep, cache_dtype
        tokens = (shape[1] // config.patch_size[1]) * (shape[2] // config.patch_size[2])
        self._window = window or shape[0]
        if shape[0] % block or self._window % block:
            raise ValueError(f"{shape[0]} frames and a window of {self._window} are not whole blocks of {block}")
        self._layout = CacheLayout(self._window, tokens)
        self._rows = block * tokens

    def videos(self, params: Params, batch: Batch, keys: Keys, exit_step: Array) -> Latents:
        """The new frames [B, f, h, w, C]; batch.given are frames before them, which they go on from."""
        return self._roll_out(jax.lax.stop_gradient(params), batch, keys, exit_step)[0]

    def videos_and_pullback(
        self, params: Params, batch: Batch, keys: Keys, exit_step: Array
    ) -> tuple[Latents, Pullback]:
        x0, tape = self._roll_out(jax.lax.stop_gradient(params), batch, keys, exit_step)
        tape = jax.lax.stop_gradient(tape)

        def pull(gradient: Latents) -> Params:
            def add(total: Params, inputs: tuple[Array, Array, Array]) -> tuple[Params, None]:
                number, noisy, of_block = inputs

                def again(params: Params) -> Latents:
                    return self._clean_again(params, batch.conditions, noisy, exit_step, tape, number)

                return jax.tree.map(jnp.add, total, jax.vjp(again, params)[1](of_block)[0]), None

            made, count = len(tape.noisy), len(tape.keys)
            zeros = jax.tree.map(jnp.zeros_like, params)
            inputs = (jnp.arange(count - made, count), tape.noisy, _split(gradient, made))
            return jax.lax.scan(add, zeros, inputs)[0]

        return x0, pull

    def _roll_out(self, params: Params, batch: Batch, keys: Keys, exit_step: Array) -> tuple[Latents, _Tape]:
        model = merge(self._graphdef, params)
        context = model.cross_keys(batch.conditions.text)
        shape = (self._block, *self._shape[1:])
        sigmas = jnp.asarray(self.sigmas, jnp.float32)
        count = len(keys)

        def clean(x: Latents, i: Array, cache: KVCache, start: Array) -> tuple[Latents, KVCache]:
            timestep = jnp.broadcast_to(timestep_from_sigma(sigmas[i]), (count,))
            velocity, cache = model.with_cache(x, timestep, context, cache, start)
            return x0_from_velocity(x, velocity, _levels(sigmas[i], x)), cache

        def update(x0: Latents, cache: KVCache, start: Array, timestep: float) -> tuple[KVCache, tuple[Array, Array]]:
            _, cache = model.with_cache(x0, jnp.full((count,), timestep, jnp.float32), context, cache, start)
            row = self._layout.slot(start) * (self._rows // self._block)
            return cache, (self._block_rows(cache.k, row), self._block_rows(cache.v, row))

        def given_block(cache: KVCache, inputs: tuple[Array, Array]) -> tuple[KVCache, tuple[Array, Array]]:
            return update(inputs[1], cache, inputs[0] * self._block, 0.0)

        def new_block(cache: KVCache, number: Array) -> tuple[KVCache, tuple[Array, Array, Array, Array]]:
            start = (given + number) * self._block

            def step(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
                x0, cache = clean(carry[0], i, carry[1], start)
                noise = jax.vmap(lambda key: step_noise(key, i, shape, number))(keys)
                return add_noise(x0, noise, _levels(sigmas[i + 1], x0)), cache

            noise = jax.vmap(lambda key: block_noise(key, number, shape))(keys)
            noisy, cache = jax.lax.fori_loop(0, exit_step, step, (noise, cache))
            x0, cache = clean(noisy, exit_step, cache, start)
            cache, (k, v) = update(x0, cache, start, self._context_timestep)
            return cache, (noisy, x0, k, v)

        cache = KVCache.empty(self._config, self._layout, count, self._cache_dtype)
        given, before = 0, []
        if batch.given is not None:
            given = batch.given.shape[1] // self._block
            blocks = (jnp.arange(given), _split(batch.given, given))
            cache, kept = jax.lax.scan(given_block, cache, blocks)
            before = [kept]
        cache, (noisy, x0, k, v) = jax.lax.scan(new_block, cache, jnp.arange(self._shape[0] // self._block))
        keys_, values = (jnp.concatenate(parts) for parts in zip(*before, (k, v), strict=True))
        return _join(x0), _Tape(noisy, keys_, values)

    def _block_rows(self, x: Any, row: Array) -> Array:
        """The rows of a block, which lie together because the window is whole blocks."""
        return jax.lax.dynamic_slice_in_dim(x, row, self._rows, axis=2)

    def _clean_again(
        self, params: Params, conditions: Conditions, noisy: Array, step: Array, tape: _Tape, number: Array
    ) -> Latents:
        """x0 of a block from the same evaluation as in the rollout."""
        model = merge(self._graphdef, params)
        sigma = jnp.asarray(self.sigmas, jnp.float32)[step]
        timestep = jnp.broadcast_to(timestep_from_sigma(sigma), noisy.shape[:1])
        context = model.cross_keys(conditions.text)
        most = self._window // self._block - 1
        first = jnp.maximum(number - most, 0)
        keys, values = (self._visible(x, first, most) for x in (tape.keys, tape.values))
        velocity = model.after_frames(
            noisy, timestep, context, keys, values, number * self._block, (number - first) * self._rows
        )
        return x0_from_velocity(noisy, velocity, _levels(sigma, noisy))

    def _visible(self, tape: Array, first: Array, count: int) -> Array:
        """Blocks first, …, first + count - 1 of the tape in one row, and room for one more: [layers, B, rows, H, D]."""
        room = jnp.zeros((count + 1, *tape.shape[1:]), tape.dtype)
        blocks = jax.lax.dynamic_slice_in_dim(jnp.concatenate([tape, room]), first, count + 1)
        return einops.rearrange(blocks, "block layer b row ... -> layer b (block row) ...")


class NoisedVideos:
    """A causal student predicts real videos, whose blocks have noise of different levels, in one pass (CausVid).

    The steps' levels and 0 are drawn for each block; there is no rollout, and no exit step.

    Args:
        graphdef: of its WanModel.
        shape: [f, h, w, C] of a video's latents; f is whole blocks.
        sigmas: falling noise levels of its steps.
        block: frames made together.
    """

    def __init__(self, graphdef: nnx.GraphDef, shape: tuple[int, ...], sigmas: tuple[float, ...], *, block: int):
        self._graphdef, self._shape, self.sigmas, self._pattern = graphdef, shape, sigmas, CausalPattern(block)

    def videos(self, params: Params, batch: Batch, keys: Keys, exit_step: Array) -> Latents:
        return self._clean(jax.lax.stop_gradient(params), batch, *self._noised(batch, keys))

    def videos_and_pullback(
        self, params: Params, batch: Batch, keys: Keys, exit_step: Array
    ) -> tuple[Latents, Pullback]:
        noisy, sigma = self._noised(batch, keys)
        x0, pull = jax.vjp(lambda params: self._clean(params, batch, noisy, sigma), params)
        return x0, lambda gradient: pull(gradient)[0]

    def _noised(self, batch: Batch, keys: Keys) -> tuple[Latents, Float[Array, "b f"]]:
        """(real videos with noise, the level of each frame)."""
        levels = jnp.asarray((*self.sigmas, 0.0), jnp.float32)
        frames, block = self._shape[0], self._pattern.block

        def draw(key: Array) -> tuple[Array, Array]:
            drawn = jax.random.randint(jax.random.fold_in(key, _LEVELS), (frames // block,), 0, len(levels))
            return initial_noise(key, self._shape), jnp.repeat(levels[drawn], block)

        noise, sigma = jax.vmap(draw)(keys)
        return add_noise(batch.latents, noise, sigma), sigma

    def _clean(self, params: Params, batch: Batch, noisy: Latents, sigma: Float[Array, "b f"]) -> Latents:
        model = merge(self._graphdef, params)
        velocity = model(noisy, timestep_from_sigma(sigma), batch.conditions.text, causal=self._pattern)
        return x0_from_velocity(noisy, velocity, sigma)


def _levels(sigma: Array, x: Latents) -> Array:
    return jnp.broadcast_to(sigma, x.shape[:1])


def _split(x: Latents, count: int) -> Array:
    return einops.rearrange(x, "b (n f) ... -> n b f ...", n=count)


def _join(x: Array) -> Latents:
    return einops.rearrange(x, "n b f ... -> b (n f) ...")
