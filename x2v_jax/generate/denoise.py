"""Noise to latents with a WanModel: guidance, both samplers, and the drivers of one step function each.

Without a callback the whole sampling is one compiled program. The few steps of a distilled model are unrolled in it, as
so many calls of one function, or on request a scan over them; UniPC's many steps are a scan. With a callback the same
step is compiled alone and called in a loop, so that somebody can watch, preview and cancel between steps. Nothing is
fused over the ends of a step (`_alone`), so that the last digit is the same in all of these.

Whether the latents are finite is worked out on the device beside each step, and read when the host waits anyway: after
the whole program, or where the loop hands a step's latents out.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from x2v_jax.diffusion import noise, step_distill, unipc
from x2v_jax.diffusion.flow import guided_velocity
from x2v_jax.diffusion.schedules import MOST_UNROLLED, Loop
from x2v_jax.generate.programs import Program
from x2v_jax.models import functional

OnStep = Callable[[int, int, Array], None]
Latents = Float[Array, "1 f h w c"]
Start = Float[Array | np.ndarray, "1 f h w c"]  # drawn on the device, or read from a file


class NotFinite(ArithmeticError):
    """After step `step` (from 0) of `count`, the latents hold NaN or infinity."""

    def __init__(self, step: int, count: int):
        super().__init__(f"step {step + 1} of {count}")
        self.step, self.count = step, count


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
        loop: how the steps of a distilled model become one program; see `schedules.Loop`.
    """

    def __init__(self, graphdef: nnx.GraphDef, *, sequential_guidance: bool = False, loop: Loop = "unrolled"):
        self._velocity, self._loop = functools.partial(_velocity, graphdef, sequential_guidance), loop
        self._distill_step = jax.jit(self._distill_step_fn, donate_argnums=(2,))
        self._distill_all = jax.jit(self._distill_all_fn, donate_argnums=(2,))
        self._unipc_start = jax.jit(unipc.init_state, donate_argnums=(0,))
        self._unipc_step = jax.jit(self._unipc_step_fn, donate_argnums=(2,))
        self._unipc_all = jax.jit(self._unipc_all_fn, donate_argnums=(2,))
        self._draw = jax.jit(_draw, static_argnames="shape")
        self._draw_keyed = jax.jit(noise.initial_noise, static_argnames="shape")
        self._step_noise = jax.jit(noise.step_noise, static_argnames="shape")

    def draw(self, seed: int, shape: tuple[int, ...]) -> tuple[Latents, Key[Array, ""]]:
        """A request's initial noise [1, f, h, w, C], and its key."""
        if seed < 1 << 32:
            return self._draw(np.uint32(seed), shape=shape)
        key = noise.seed_key(seed)
        return self._draw_keyed(key, shape=shape), key

    def sample(
        self,
        params: functional.Params,
        conditions: Conditions,
        initial: Start,
        renoise: Key[Array, ""] | Float[np.ndarray, "s f h w c"],
        schedule: np.ndarray | unipc.Coefficients,
        on_step: OnStep | None = None,
    ) -> Latents:
        """With the sampler that the schedule belongs to: UniPC's table, or noise levels of step distillation."""
        if isinstance(schedule, unipc.Coefficients):
            return self.sample_unipc(params, conditions, initial, schedule, on_step)
        return self.sample_step_distill(params, conditions, initial, schedule, renoise, on_step)

    def sample_step_distill(
        self,
        params: functional.Params,
        conditions: Conditions,
        initial: Start,
        sigmas: np.ndarray,
        renoise: Key[Array, ""] | Float[np.ndarray, "s f h w c"],
        on_step: OnStep | None = None,
    ) -> Latents:
        """Predict x0, add noise at the next level, repeat. `initial` is donated.

        Args:
            sigmas: float32 [S], from step_sigmas; [S, 2] with the timesteps that the network is asked at.
            renoise: the request's key, or the noise itself for the S - 1 re-noisings.
            on_step: called with (step, S, latents) after each.

        Raises:
            NotFinite: the latents are not, after some step.
        """
        if on_step is None:
            return _checked(*self._distill_all(params, conditions, initial, renoise, sigmas))
        latents = jnp.asarray(initial)
        one = functools.partial(self._distill_step, params, conditions)
        steps = step_distill.steps(one, latents, sigmas, lambda i: self._noise_after(renoise, i, initial.shape))
        told = []
        for i, (latents, finite) in enumerate(steps):
            told.append(_hand_out(i, len(sigmas), latents, finite, on_step))
        return _checked(latents, told)

    def sample_unipc(
        self,
        params: functional.Params,
        conditions: Conditions,
        initial: Start,
        table: unipc.Coefficients,
        on_step: OnStep | None = None,
    ) -> Latents:
        """UniPC with the coefficients of `table`. `initial` is donated; the rest as in `sample_step_distill`."""
        if on_step is None:
            return _checked(*self._unipc_all(params, conditions, initial, table))
        state, count, told = self._unipc_start(initial), len(table.sigma), []
        for i in range(count):
            state, finite = self._unipc_step(params, conditions, state, unipc.coefficients_at(table, i))
            told.append(_hand_out(i, count, state.latents, finite, on_step))
        return _checked(state.latents, told)

    def programs(
        self,
        params: object,
        conditions: Conditions,
        shape: tuple[int, ...],
        schedule: np.ndarray | unipc.Coefficients,
        *,
        watched: bool,
    ) -> Iterator[Program]:
        """What sampling from a seed compiles.

        Args:
            params, conditions: in shapes.
            shape: of the latents.
            schedule: sigmas or a table, as the samplers take them.
            watched: whether there will be an on_step.
        """
        initial = jax.ShapeDtypeStruct(shape, jnp.float32)
        seed, number = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)
        key = jax.eval_shape(lambda seed: _draw(seed, shape)[1], seed)
        yield Program("noise", self._draw, (seed,), {"shape": shape})
        if isinstance(schedule, unipc.Coefficients):
            if not watched:
                yield Program("denoising", self._unipc_all, (params, conditions, initial, schedule))
                return
            state = jax.eval_shape(unipc.init_state, initial)
            row = unipc.Coefficients(*[number] * len(unipc.Coefficients._fields))
            yield Program("first state", self._unipc_start, (initial,))
            yield Program("denoising step", self._unipc_step, (params, conditions, state, row))
        elif not watched:
            yield Program("denoising", self._distill_all, (params, conditions, initial, key, schedule))
        else:
            step = jax.ShapeDtypeStruct((), jnp.int32)
            yield Program("noise between steps", self._step_noise, (key, step), {"shape": shape})
            level = jax.ShapeDtypeStruct(schedule.shape[1:], jnp.float32)
            arguments = (params, conditions, initial, level, level, initial)
            yield Program("denoising step", self._distill_step, arguments)

    def _noise_after(self, renoise: Any, i: int, shape: tuple[int, ...]) -> Any:
        return self._step_noise(renoise, np.int32(i), shape=shape) if _is_key(renoise) else renoise[i][None]

    def _distill_step_fn(
        self, params: object, conditions: Conditions, latents: Array, sigma: Array, following: Array, added: Array
    ) -> tuple[Array, Array]:
        latents, sigma, following, added = _alone((latents, sigma, following, added))
        velocity_fn = functools.partial(self._velocity, params, conditions)
        latents = step_distill.evaluate(velocity_fn, latents, sigma, following, added)
        return _alone((latents, _is_finite(latents)))

    def _distill_all_fn(
        self, params: Any, conditions: Conditions, initial: Array, renoise: Any, sigmas: Array
    ) -> tuple[Array, Array]:
        if self._loop == "unrolled" and len(sigmas) <= MOST_UNROLLED:
            # Calls of the jitted step: it is traced and lowered once, and its kernels are the same text in all calls.
            one = functools.partial(self._distill_step, params, conditions)
            return step_distill.unrolled(one, initial, sigmas, lambda i: self._noise_after(renoise, i, initial.shape))
        if _is_key(renoise):
            after = lambda i: noise.step_noise(renoise, i, initial.shape)  # noqa: E731
        else:
            given = jnp.concatenate([renoise[: len(sigmas) - 1], jnp.zeros_like(initial)])
            after = lambda i: given[i][None]  # noqa: E731
        one = functools.partial(self._distill_step_fn, params, conditions)
        return step_distill.scan(one, initial, sigmas, after)

    def _unipc_step_fn(
        self, params: object, conditions: Conditions, state: unipc.UniPCState, c: unipc.Coefficients
    ) -> tuple[unipc.UniPCState, Array]:
        state, c = _alone((state, c))
        state = unipc.step(state, self._velocity(params, conditions, state.latents, c.timestep), c)
        return _alone((state, _is_finite(state.latents)))

    def _unipc_all_fn(
        self, params: object, conditions: Conditions, initial: Array, table: unipc.Coefficients
    ) -> tuple[Array, Array]:
        step = functools.partial(self._unipc_step_fn, params, conditions)
        state, finite = jax.lax.scan(step, unipc.init_state(initial), jax.tree.map(jnp.asarray, table))
        return state.latents, finite


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


def _draw(seed: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    key = jax.random.key(seed)
    return noise.initial_noise(key, shape), key


def _alone[T](values: T) -> T:
    """The same values; the compiler moves and fuses nothing past this point of a program."""
    return jax.lax.optimization_barrier(values)


def _is_finite(latents: Array) -> Array:
    return jnp.isfinite(latents).all()


def _hand_out(step: int, count: int, latents: Array, finite: Array, on_step: OnStep | None) -> Array:
    """Waits for a step and shows it, where somebody watches. Returns `finite`, to be looked at in the end."""
    if on_step is None:
        return finite
    latents = jax.block_until_ready(latents)
    if not finite:  # it is there with the latents: reading it waits for nothing
        raise NotFinite(step, count)
    on_step(step, count, latents)
    return finite


def _checked(latents: Array, finite: Array | list[Array]) -> Array:
    if isinstance(latents, Tracer):  # part of a larger program: nothing can be read yet
        return latents
    good = np.asarray(finite)  # waits for the whole sampling, as its clock does anyway
    if not good.all():
        raise NotFinite(int(np.argmin(good)), len(good))
    return latents


def _is_key(renoise: Any) -> bool:
    return jnp.issubdtype(renoise.dtype, jax.dtypes.prng_key)
