"""Noise to latents with a WanModel: guidance, both samplers, and two drivers of one step function.

Without a callback the whole sampling is one compiled program (few steps unrolled, many scanned). With one, the same
step is compiled alone and called in a loop, so that somebody can watch, preview and cancel between steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from x2v_jax.diffusion import noise, step_distill, unipc
from x2v_jax.diffusion.flow import guided_velocity, timestep_from_sigma
from x2v_jax.models import functional

OnStep = Callable[[int, int, Array], None]
Latents = Float[Array, "1 f h w c"]


class Conditions(NamedTuple):
    """What the velocity depends on besides latents and time.

    text: [1, L, D], or with guidance [2, L, D]: negative prompt, prompt.
    guidance_scale: scalar; not used where there is one text.
    image_features: [1, N, D] from CLIP, image-to-video only.
    image_latents: [1, F, h, w, 20], mask and encoded image, image-to-video only.
    """

    text: Array
    guidance_scale: Any = 1.0
    image_features: Array | None = None
    image_latents: Array | None = None


class Denoiser:
    """The samplers, compiled for one network.

    Args:
        graphdef: of a WanModel.
        sequential_guidance: two passes of batch 1 instead of one of batch 2.
    """

    def __init__(self, graphdef: nnx.GraphDef, *, sequential_guidance: bool = False):
        self._velocity = functools.partial(_velocity, graphdef, sequential_guidance)
        self._distill_step = jax.jit(self._distill_step_fn, donate_argnums=(2,))
        self._distill_all = jax.jit(self._distill_all_fn, static_argnames="sigmas", donate_argnums=(2,))
        self._unipc_step = jax.jit(self._unipc_step_fn, donate_argnums=(2,))
        self._unipc_all = jax.jit(self._unipc_all_fn, donate_argnums=(2,))
        self._step_noise = jax.jit(noise.step_noise, static_argnames="shape")

    def sample_step_distill(
        self,
        params: functional.Params,
        conditions: Conditions,
        initial: Latents,
        sigmas: np.ndarray,
        renoise: Key[Array, ""] | Float[np.ndarray, "s f h w c"],
        on_step: OnStep | None = None,
    ) -> Latents:
        """Predict x0, add noise at the next level, repeat. `initial` is donated.

        Args:
            sigmas: float32 [S], from step_sigmas.
            renoise: the request's key, or the noise itself for the S - 1 re-noisings.
            on_step: called with (step, S, latents) after each.
        """
        if on_step is None:
            return self._distill_all(params, conditions, initial, renoise, sigmas=tuple(float(s) for s in sigmas))
        latents, count = initial, len(sigmas)
        for i, sigma in enumerate(sigmas):
            # At the last step level 0 of no noise leaves x0 as it is, so that one program serves all steps.
            last = i + 1 == count
            added = jnp.zeros_like(latents) if last else self._noise_after(renoise, i, latents.shape)
            following = np.float32(0) if last else sigmas[i + 1]
            latents = self._distill_step(params, conditions, latents, sigma, following, added)
            on_step(i, count, jax.block_until_ready(latents))
        return latents

    def sample_unipc(
        self,
        params: functional.Params,
        conditions: Conditions,
        initial: Latents,
        table: unipc.Coefficients,
        on_step: OnStep | None = None,
    ) -> Latents:
        """UniPC with the coefficients of `table`. `initial` is donated. on_step: as in `sample_step_distill`."""
        if on_step is None:
            return self._unipc_all(params, conditions, initial, table)
        state, count = unipc.init_state(initial), len(table.sigma)
        for i in range(count):
            state = self._unipc_step(params, conditions, state, unipc.coefficients_at(table, i))
            on_step(i, count, jax.block_until_ready(state.latents))
        return state.latents

    def _noise_after(self, renoise: Any, i: int, shape: tuple[int, ...]) -> Array:
        return self._step_noise(renoise, i, shape=shape) if _is_key(renoise) else jnp.asarray(renoise[i])[None]

    def _distill_step_fn(
        self, params: Any, conditions: Conditions, latents: Array, sigma: Array, following: Array, added: Array
    ) -> Array:
        velocity = self._velocity(params, conditions, latents, timestep_from_sigma(sigma))
        return step_distill.step(latents, velocity, sigma, following, added)

    def _distill_all_fn(
        self, params: Any, conditions: Conditions, initial: Array, renoise: Any, *, sigmas: tuple[float, ...]
    ) -> Array:
        def renoise_fn(i: int) -> Array:
            return noise.step_noise(renoise, i, initial.shape) if _is_key(renoise) else renoise[i][None]

        return step_distill.sample(
            functools.partial(self._velocity, params, conditions), initial, np.asarray(sigmas, np.float32), renoise_fn
        )

    def _unipc_step_fn(
        self, params: Any, conditions: Conditions, state: unipc.UniPCState, c: unipc.Coefficients
    ) -> unipc.UniPCState:
        return unipc.step(state, self._velocity(params, conditions, state.latents, c.timestep), c)

    def _unipc_all_fn(self, params: Any, conditions: Conditions, initial: Array, table: unipc.Coefficients) -> Array:
        return unipc.sample(functools.partial(self._velocity, params, conditions), initial, table)


def _velocity(
    graphdef: nnx.GraphDef, sequential: bool, params: Any, conditions: Conditions, latents: Array, timestep: Array
) -> Array:
    """latents [1, F, h, w, C], timestep scalar -> guided velocity of the same shape."""
    model = functional.merge(graphdef, params)
    if conditions.image_latents is not None:
        latents = jnp.concatenate([latents, conditions.image_latents], axis=-1)

    def predict(text: Array) -> Array:
        batch = text.shape[0]
        features = conditions.image_features
        return model(
            jnp.repeat(latents, batch, axis=0),
            jnp.full((batch,), timestep, jnp.float32),
            text,
            None if features is None else jnp.repeat(features, batch, axis=0),
        )

    text = conditions.text
    if text.shape[0] == 1:
        return predict(text)
    if sequential:
        return guided_velocity(predict(text[:1]), predict(text[1:]), conditions.guidance_scale)
    both = predict(text)
    return guided_velocity(both[:1], both[1:], conditions.guidance_scale)


def _is_key(renoise: Any) -> bool:
    return jnp.issubdtype(renoise.dtype, jax.dtypes.prng_key)
