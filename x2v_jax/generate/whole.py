"""Videos that are made all frames at once: conditions and noise -> sampler -> latents, which stay on the device."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from x2v_jax.diffusion import image_condition, step_distill, unipc
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.components import Components
from x2v_jax.generate.denoise import Conditions, NotFinite, OnStep
from x2v_jax.generate.programs import Program
from x2v_jax.media import tensor_files
from x2v_jax.request import Request

_pin_first_frame = jax.jit(image_condition.pin_first_frame, donate_argnums=(0,))


def make_latents(components: Components, request: Request, clock: Clock, on_step: OnStep | None) -> Array:
    """Latents [1, f, h, w, C] of a resolved request, on the device.

    Args:
        clock: takes the time of "load", "text", "image" and "denoise".
        on_step: see `Denoiser.sample_step_distill`.

    Raises:
        UserError: a file that the request names does not fit, or the latents are not finite.
    """
    initial, renoise = _noise(components, request)  # first, so that a file that does not fit costs no loading
    conditions = _conditions(components, request, clock)
    components.release_encoders()
    with clock("load"):
        params = components.network("transformer").load()
    with clock("denoise"):
        schedule = _schedule(request)
        sampler: Any = components.denoiser.sample_unipc
        arguments = (params, conditions, initial, schedule)
        if not isinstance(schedule, unipc.Coefficients):
            sampler, arguments = components.denoiser.sample_step_distill, (*arguments, renoise)
        try:
            latents = sampler(*arguments, on_step)
        except NotFinite as error:
            raise components.not_finite(f"after {error}") from None
        if request.pin_first_frame and conditions.image_latents is not None:
            latents = _pin_first_frame(latents, conditions.image_latents)
        return latents


def programs(components: Components, request: Request, *, watched: bool) -> Iterator[Program]:
    """What making a resolved request's video compiles.

    Args:
        watched: whether there will be an on_step.
    """
    if request.text_embeddings is None:
        yield from components.prompts.programs()
    shape = (1, *components.latent_shape(request))
    transformer = components.network("transformer")
    config = transformer.config
    text: Any = jax.ShapeDtypeStruct((1 + request.is_guided, config.text_len, config.text_dim), jnp.float32)
    conditions = Conditions(text, jax.ShapeDtypeStruct((), jnp.float32))
    if components.checkpoint.task == "i2v":
        frames, height, width = components.output_size(request)
        assert frames is not None  # only block-by-block videos are endless
        for program in components.images.programs((frames, height, width)):
            yield program
            made = jax.eval_shape(lambda *a, p=program: p.function(*a, **(p.static or {})), *program.arguments)
            name = "image_features" if program.name == "image encoder" else "image_latents"
            conditions = conditions._replace(**{name: made})
    schedule = _schedule(request)
    yield from components.denoiser.programs(transformer.shapes, conditions, shape, schedule, watched=watched)
    if request.pin_first_frame and conditions.image_latents is not None:
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        yield Program("first frame", _pin_first_frame, (latents, conditions.image_latents))
    yield from components.vae.programs(shape)


def _schedule(request: Request) -> np.ndarray | unipc.Coefficients:
    """Noise levels of the step-distill sampler, or UniPC's table."""
    assert request.shift is not None  # resolved
    if request.denoising_step_list is not None:
        warp = bool(request.warp_denoising_step)
        return step_distill.step_sigmas(request.denoising_step_list, request.shift, warp=warp)
    assert request.num_inference_steps  # resolved
    return unipc.unipc_table(request.num_inference_steps, request.shift)


def _noise(components: Components, request: Request) -> tuple[Any, Any]:
    """What to start from, and the noise to add between steps or the key that gives it."""
    shape = components.latent_shape(request)
    assert request.seed is not None  # resolved
    drawn, key = components.denoiser.draw(request.seed, (1, *shape))
    if request.initial_noise is None:
        return drawn, key
    steps = len(request.denoising_step_list) if request.denoising_step_list is not None else None
    initial, renoise = tensor_files.read_noise(request.initial_noise, shape, steps)
    return np.ascontiguousarray(initial)[None], key if renoise is None else renoise


def _conditions(components: Components, request: Request, clock: Clock) -> Conditions:
    assert request.guidance_scale is not None  # resolved
    text = jax.device_put(np.stack(components.texts(request, clock)))
    conditions = Conditions(text, np.float32(request.guidance_scale))
    if components.checkpoint.task != "i2v":
        return conditions
    frames, height, width = components.output_size(request)
    assert frames is not None  # only block-by-block videos are endless
    features, latents = components.images(request.image, (frames, height, width), clock)
    return conditions._replace(image_features=features, image_latents=latents)
