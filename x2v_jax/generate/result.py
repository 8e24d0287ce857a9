"""What `Pipeline.generate` gives."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from x2v_jax.memory import predict
from x2v_jax.request.resolve import ResolvedRequest

Frames = UInt8[np.ndarray, "F H W 3"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One video and how it came about.

    frames: uint8 [F, H, W, 3].
    latents: float32 [f, h, w, C], as they were before the VAE.
    request: as it was decided, with the seed that was drawn.
    seconds: wall time of "load", "text", "image", "denoise" and "vae"; the first call of a size includes compiling.
    memory_plan: predicted bytes.
    peak_bytes: the process's (CPU) or the device's (GPU) highest so far.
    """

    frames: Frames
    latents: Float[np.ndarray, "f h w c"]
    request: ResolvedRequest
    seconds: dict[str, float]
    memory_plan: predict.MemoryPlan
    peak_bytes: int
