"""What can be wrong with a request: each function lists sentences that name the field, its value and the fix."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from x2v_jax import request_rollout
from x2v_jax.diffusion.schedules import step_sigmas, unipc_schedule
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, VaeConfig, WanConfig
from x2v_jax.request_fields import as_config, real_problems, whole_problems

if TYPE_CHECKING:
    from x2v_jax.request import Request

# Positions per axis for which the published models have rotary angles.
_MAX_POSITIONS = 1024
# jax.random.key takes 32 bits: seeds that differ by 2^32 would give the same video.
MAX_SEED = 2**32 - 1


@runtime_checkable
class Model(Protocol):
    """What `resolve` asks of a checkpoint; `checkpoint.store.NativeCheckpoint` answers it."""

    @property
    def task(self) -> str | None: ...
    @property
    def variant(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...
    def config(self, component: str) -> Any: ...
    def has(self, component: str) -> bool: ...


def field_problems(request: "Request") -> list[str]:
    """Types and ranges that hold for every model."""
    problems = [
        *whole_problems(request, "height", 1, 1 << 20),
        *whole_problems(request, "width", 1, 1 << 20),
        *whole_problems(request, "num_frames", 1, 1 << 23),
        *whole_problems(request, "fps", 1, 240),
        *whole_problems(request, "num_inference_steps", 1, 1000),
        *whole_problems(request, "seed", 0, MAX_SEED),
        *real_problems(request, "guidance_scale", 0.0, 100.0),
        *real_problems(request, "shift", 0.01, 100.0),
        *_step_list_problems(request.denoising_step_list),
        *request_rollout.type_problems(request),
    ]
    for name in ("prompt", "negative_prompt"):
        value = getattr(request, name)
        if not isinstance(value, str) and not (name == "negative_prompt" and value is None):
            problems.append(f"{name} is {value!r}; give one string (one request makes one video)")
    for name in ("image", "initial_noise", "text_embeddings", "continue_from"):
        value = getattr(request, name)
        if isinstance(value, str | os.PathLike) and not pathlib.Path(value).is_file():
            problems.append(f"{name} is {os.fspath(value)!r}, but there is no such file; mend the path")
    return problems


def _step_list_problems(steps: Sequence[float] | None) -> list[str]:
    try:
        if steps is not None:
            step_sigmas(steps, warp=False)
    except UserError as error:
        return [str(error)]
    return []


def schedule_problems(request: "Request", schedule: Schedule, has_loras: bool) -> list[str]:
    """Settings that contradict what the checkpoint was trained for."""
    anyway = "or set allow_mismatch to true to run it anyway"
    steps = request.denoising_step_list
    if not schedule.is_distilled:
        if steps is None or has_loras:
            return []
        return [
            f"denoising_step_list is {tuple(steps)}, but this checkpoint is not distilled and needs its "
            f"{schedule.num_inference_steps} UniPC steps; leave the list out, add the distillation LoRA, {anyway}"
        ]
    trained = schedule.denoising_step_list
    assert trained is not None
    problems = []
    if request.is_guided:
        problems.append(
            f"guidance_scale is {request.guidance_scale:g}, but this distilled checkpoint has guidance trained in and "
            f"burns or blurs with more; leave it out or set it to 1, {anyway}"
        )
    if steps is not None and tuple(steps) != trained:
        problems.append(
            f"denoising_step_list is {tuple(steps)}, but this checkpoint was distilled for {trained}; leave it out, "
            + anyway
        )
    if request.num_inference_steps is not None and request.num_inference_steps != len(trained):
        problems.append(
            f"num_inference_steps is {request.num_inference_steps}, but this checkpoint was distilled for the "
            f"{len(trained)} steps {trained}; leave it out, {anyway}"
        )
    if request.shift is not None and not math.isclose(request.shift, schedule.shift):
        problems.append(
            f"shift is {request.shift:g}, but this checkpoint was distilled with {schedule.shift:g}; leave it out, "
            + anyway
        )
    if request.warp_denoising_step is not None and request.warp_denoising_step != schedule.warp_denoising_step:
        problems.append(
            f"warp_denoising_step is {request.warp_denoising_step}, but this checkpoint's list is made for "
            f"{schedule.warp_denoising_step}; leave it out, {anyway}"
        )
    return problems


def task_problems(request: "Request", model: Model) -> list[str]:
    problems = []
    causal = model.schedule.causal is not None
    if model.variant in ("causvid", "self_forcing") and not causal:
        problems.append(
            f"the checkpoint's variant is {model.variant!r}, which makes videos block by block, but its schedule does "
            "not say how; convert it again"
        )
    if not causal:
        problems += request_rollout.whole_video_problems(request)
    if model.task == "i2v" and request.image is None:
        problems.append("image is missing, and this is an image-to-video checkpoint; give the path of an image")
    if model.task == "t2v" and request.image is not None and not causal:
        problems.append(
            "image is given, but this is a text-to-video checkpoint and would ignore it; leave it out or use an i2v one"
        )
    if model.task == "t2v" and request.pin_first_frame and not causal:
        problems.append("pin_first_frame is set, but this is a text-to-video checkpoint without an image; leave it out")
    steps, count = request.denoising_step_list, request.num_inference_steps
    if steps is not None and count is not None and count != len(steps):
        problems.append(
            f"num_inference_steps is {count}, but denoising_step_list has {len(steps)} entries; leave the number out"
        )
    if steps is not None and request.is_guided and not model.schedule.is_distilled:
        problems.append(
            f"guidance_scale is {request.guidance_scale:g} with a denoising_step_list, whose sampler has none; "
            "leave one of the two out"
        )
    return problems


def size_problems(request: "Request", model: Model) -> list[str]:
    """Height, width and frame count that the strides of the VAE and the patches allow (`request` is filled)."""
    vae = as_config(VaeConfig, model.config("vae"))
    patch = as_config(WanConfig, model.config("transformer")).patch_size
    problems = []
    for name, step in (("height", vae.spatial_stride * patch[1]), ("width", vae.spatial_stride * patch[2])):
        value = getattr(request, name)
        # The image gives an image-to-video clip its shape, so there only the product of the two matters.
        fits = model.task == "i2v" or value % step == 0
        problems += _multiple_problem(name, value, step, 0, fits and value >= step, f"multiples of {step}")
    if model.schedule.causal is not None:  # whole blocks: `request_rollout` says which
        return problems
    step = vae.temporal_stride * patch[0]
    frames: int = request.num_frames  # type: ignore[assignment]
    fits = (frames - 1) % step == 0
    problems += _multiple_problem("num_frames", frames, step, 1, fits, f"{step}n+1 frames")
    return problems


def _multiple_problem(name: str, value: int, step: int, offset: int, fits: bool, rule: str) -> list[str]:
    largest = _MAX_POSITIONS * step - (step - 1) * offset
    if fits and value <= largest:
        return []
    low = (value - offset) // step * step + offset
    near = [n for n in (low, low + step) if max(step * (1 - offset), offset) <= n <= largest]
    if value > largest:
        near = [largest]
    if value - low > low + step - value:
        near.reverse()  # the nearest first
    choices = " or ".join(str(n) for n in near)
    limit = f" up to {largest}" if value > largest else ""
    return [f"{name} is {value}; this model makes {rule}{limit}: use {choices}"]


def noise_level_problems(request: "Request") -> list[str]:
    """What only shows when shift and steps meet: two steps at one noise level, no signal at the first step."""
    assert request.shift and request.num_inference_steps  # filled
    try:
        if request.denoising_step_list is not None:
            step_sigmas(request.denoising_step_list, request.shift, warp=bool(request.warp_denoising_step))
        else:
            unipc_schedule(request.num_inference_steps, request.shift)
    except UserError as error:
        return [str(error)]
    return []


def component_problems(request: "Request", model: Model) -> list[str]:
    needed = {"transformer": "the denoising network", "vae": "the autoencoder"}
    if request.text_embeddings is None:
        needed["text_encoder"] = "the text encoder (or give text_embeddings)"
        needed["tokenizer"] = "the tokenizer (or give text_embeddings)"
    if model.task == "i2v":
        needed["image_encoder"] = "the CLIP image encoder"
    return [
        f"the checkpoint lacks its {name}, {what}; convert it again with every component of the source"
        for name, what in needed.items()
        if not model.has(name)
    ]
