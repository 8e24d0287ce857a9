"""The programs that `aot_sampler` compiles: all steps of a distilled model as one program, from shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.diffusion.schedules import Loop, step_sigmas
from x2v_jax.generate.denoise import Conditions, Denoiser
from x2v_jax.generate.programs import Program
from x2v_jax.models.config import ClipConfig, VaeConfig, WanConfig
from x2v_jax.models.networks import abstract_network

CONFIGS: dict[str, Callable[[], WanConfig]] = {
    "T2V-1.3B": WanConfig.t2v_1_3b,
    "T2V-14B": WanConfig.t2v_14b,
    "I2V-14B": WanConfig.i2v_14b,
}
PIXELS = {"480P": (480, 832), "720P": (720, 1280)}
FRAMES = 81
STEP_LIST, SHIFT = (1000, 750, 500, 250), 5.0


def latent_shape(size: str, frames: int = FRAMES) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents."""
    vae, (height, width) = VaeConfig(), PIXELS[size]
    return (frames - 1) // vae.temporal_stride + 1, height // vae.spatial_stride, width // vae.spatial_stride


def sampler_program(
    config: WanConfig,
    latents: tuple[int, int, int],
    *,
    quantization: str | None = None,
    ops: Any = None,
    loop: Loop = "unrolled",
) -> Program:
    """The four steps from noise to latents as `Denoiser` compiles them, weights in bfloat16 or, quantized, in 8 bits.

    Args:
        latents: frames, rows and columns.
        quantization: None, "int8" or "float8_e4m3fn".
        ops: the network's `OpChoice`; None: the default one.
        loop: how the steps are one program.
    """
    options: dict[str, Any] = {"param_dtype": jnp.bfloat16}
    options |= {} if quantization is None else {"quantization": quantization}
    options |= {} if ops is None else {"ops": ops}
    graphdef, params = abstract_network(config, **options)
    sigmas = step_sigmas(STEP_LIST, SHIFT, warp=True)
    shape = (1, *latents, config.out_dim)
    programs = Denoiser(graphdef, loop=loop).programs(params, conditions(config, latents), shape, sigmas, watched=False)
    return next(program for program in programs if program.name == "denoising")


def conditions(config: WanConfig, latents: tuple[int, int, int]) -> Conditions:
    """Shapes of what a video of this size is made from."""
    text: Any = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.float32)
    scale: Any = jax.ShapeDtypeStruct((), np.float32)
    if config.model_type == "t2v":
        return Conditions(text, scale)
    clip = ClipConfig()
    tokens = (clip.image_size // clip.patch_size) ** 2 + 1
    features: Any = jax.ShapeDtypeStruct((1, tokens, config.clip_dim), jnp.float32)
    image: Any = jax.ShapeDtypeStruct((1, *latents, config.in_dim - config.out_dim), jnp.float32)
    return Conditions(text, scale, features, image)
