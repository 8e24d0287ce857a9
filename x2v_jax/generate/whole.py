"""Videos that are made all frames at once: what the stages of `Pipeline.generate` start from, and what they compile."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from x2v_jax.diffusion import image_condition, unipc
from x2v_jax.generate.components import Components
from x2v_jax.generate.denoise import Conditions, Denoiser, Start
from x2v_jax.generate.programs import Program
from x2v_jax.request.inputs import Inputs
from x2v_jax.request.resolve import ResolvedRequest, WholePlan

Renoise = Key[Array, ""] | Float[np.ndarray, "s f h w c"]

pin_first_frame = jax.jit(image_condition.pin_first_frame, donate_argnums=(0,))


def schedule(plan: WholePlan) -> np.ndarray | unipc.Coefficients:
    """Noise levels float32 [S] of the step-distill sampler ([S, 2] with timesteps of their own), or UniPC's table."""
    if plan.sampler == "step_distill":
        sigmas = np.asarray(plan.sigmas, np.float32)
        return sigmas if plan.timesteps is None else np.stack([sigmas, np.asarray(plan.timesteps, np.float32)], axis=1)
    return unipc.unipc_table(len(plan.sigmas), plan.shift)


def noise(
    denoiser: Denoiser, seed: int, shape: tuple[int, int, int, int], plan: WholePlan, inputs: Inputs
) -> tuple[Start, Renoise]:
    """What to start from, and what is added between steps: the noise itself, or the key that gives it.

    Args:
        shape: [f, h, w, C] of the latents.
        inputs: perhaps with a file of noise.

    Raises:
        UserError: the file of noise does not fit.
    """
    drawn, key = denoiser.draw(seed, (1, *shape))
    given = inputs.noise(shape, len(plan.sigmas) if plan.sampler == "step_distill" else None)
    if given is None:
        return drawn, key
    initial, between = given
    return np.ascontiguousarray(initial)[None], key if between is None else between


def programs(components: Components, request: ResolvedRequest, plan: WholePlan, *, watched: bool) -> Iterator[Program]:
    """What making a video compiles, but its texts' embeddings.

    Args:
        watched: whether there will be an on_step.
    """
    shape = (1, *request.latent_shape)
    transformer = components.network("transformer")
    config = transformer.config
    text: Any = jax.ShapeDtypeStruct((len(request.prompts), config.text_len, config.text_dim), jnp.float32)
    conditions = Conditions(text, jax.ShapeDtypeStruct((), jnp.float32))
    if components.checkpoint.task == "i2v":
        stride = components.network("vae").config.spatial_stride
        for program in components.images.programs((request.num_frames, shape[2] * stride, shape[3] * stride)):
            yield program
            made = jax.eval_shape(lambda *a, p=program: p.function(*a, **(p.static or {})), *program.arguments)
            name = "image_features" if program.name == "image encoder" else "image_latents"
            conditions = conditions._replace(**{name: made})
    yield from components.denoiser.programs(transformer.shapes, conditions, shape, schedule(plan), watched=watched)
    if request.pin_first_frame and conditions.image_latents is not None:
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        yield Program("first frame", pin_first_frame, (latents, conditions.image_latents))
    yield from components.vae.programs(shape)
