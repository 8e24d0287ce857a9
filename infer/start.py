"""From checked settings to a pipeline: the first that imports jax."""

import os
import sys
from typing import TYPE_CHECKING

from x2v_jax.request.resolve import WholePlan

from .settings import Settings, options

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline


def pipeline(settings: Settings) -> "Pipeline":
    """The pipeline that the settings describe, with jax and its compilation cache set up.

    Raises:
        UserError: the device cannot run what they name.
    """
    _set_up_jax(settings.config.compilation_cache)
    from x2v_jax.pipeline import Pipeline

    return Pipeline(settings.checkpoint, loras=settings.loras, compilation_cache="", **options(settings.config))


def _set_up_jax(cache: str) -> None:
    # By default jax takes three quarters of a GPU, and the large models need more; the rest is for CUDA's libraries.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    from x2v_jax.generate.programs import start_cache

    start_cache(cache)


def announce(pipeline: "Pipeline", settings: Settings) -> None:
    """Says what will be made, and warns where memory may not suffice.

    Raises:
        UserError: see `Pipeline.check_memory`.
    """
    import jax

    request = settings.jobs[0].request
    plan, (_, height, width) = pipeline.plan(request), pipeline.output_size(request)
    frames = "endless" if request.endless else f"{request.num_frames} frames of"
    if isinstance(request.plan, WholePlan):
        making = f"{request.num_inference_steps} steps, guidance {request.guidance_scale:g}"
    else:
        making = (
            f"{request.num_inference_steps} steps for each block of {request.plan.block} latent frames, "
            f"{request.plan.mode} window of {request.plan.window}"
        )
    on_host = f" and {plan.host / 1e9:.1f} GB of the host's" if plan.host else ""
    checkpoint, device = settings.checkpoint, jax.devices()[0].device_kind
    print(
        f"{checkpoint.path} ({checkpoint.task} {checkpoint.variant}) on {device}: {frames} {height}x{width}, {making}, "
        f"{settings.config.dtype}; about {plan.peak / 1e9:.1f} GB of memory{on_host}",
        file=sys.stderr,
    )
    if checkpoint.task == "i2v" and (height, width) != (request.height, request.width):
        print(
            f"note: {request.height}x{request.width} is the area, and of this picture's shape that is {height}x{width} "
            "by Wan's published rule, which rounds down; size_rule=exact makes what is asked",
            file=sys.stderr,
        )
    if pipeline.lora_report is not None:
        print(pipeline.lora_report, file=sys.stderr)
    pipeline.check_memory(request)
