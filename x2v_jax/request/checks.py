"""What can be wrong with a request: each function lists sentences that name the field, its value and the fix."""

import math
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import TypeGuard, get_args

from x2v_jax.diffusion.rollout_plan import Mode, Positions
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import UserError, is_number
from x2v_jax.models.config import Schedule, relative_by_channels
from x2v_jax.request.request import Model, Request

# Positions per axis for which the published models have rotary angles.
_MAX_POSITIONS = 1024
MAX_SEED = 2**64 - 1
SIZE_RULES = ("published", "exact")
KV_CACHES = ("bfloat16", "float32", "int8", "int8_e4m3")
_MOST = 1 << 20
# Field -> smallest and largest whole number, or number; of every model, and of those that work block by block.
_WHOLE = {
    "height": (1, _MOST), "width": (1, _MOST), "num_frames": (1, 1 << 23), "fps": (1, 240),
    "num_inference_steps": (1, 1000), "seed": (0, MAX_SEED),
}  # fmt: skip
_REAL = {"guidance_scale": (0.0, 100.0), "shift": (0.01, 100.0)}
_BLOCK_CHOICES = {"rollout_mode": get_args(Mode), "rollout_positions": get_args(Positions), "kv_cache": KV_CACHES}
_BLOCK_WHOLE = {
    "rollout_window": (1, _MOST), "rollout_sink": (0, _MOST), "num_fragments": (1, _MOST),
    "num_frame_per_block": (1, _MOST), "num_blocks": (1, _MOST), "frame_seq_length": (1, 1 << 30),
}  # fmt: skip
_BLOCK_FIELDS = (
    "rollout_mode", "rollout_window", "rollout_sink", "rollout_positions", "context_noise", "seconds", "endless",
    "continue_from", "prompt_schedule", "kv_cache", "num_frame_per_block", "num_fragments", "num_blocks",
    "frame_seq_length",
)  # fmt: skip


def field_problems(request: Request) -> list[str]:
    """Types and ranges that hold for every model."""
    values: dict[str, object] = {name: getattr(request, name) for name in request.field_names()}
    problems: list[str] = []
    if request.size_rule not in SIZE_RULES:
        problems.append(f"size_rule is {request.size_rule!r}; give {' or '.join(SIZE_RULES)}")
    for name, (least, most) in _WHOLE.items():
        problems += _whole_problems(name, values[name], least, most)
    for name, (low, high) in _REAL.items():
        problems += _real_problems(name, values[name], low, high)
    problems += _step_list_problems(request.denoising_step_list)
    for name, choices in _BLOCK_CHOICES.items():
        if values[name] is not None and values[name] not in choices:
            either = ", ".join(repr(choice) for choice in choices)
            problems.append(f"{name} is {values[name]!r}; give one of {either}")
    for name, (least, most) in _BLOCK_WHOLE.items():
        problems += _whole_problems(name, values[name], least, most)
    problems += _real_problems("seconds", values["seconds"], 0.001, 1e7)
    problems += _prompt_schedule_problems(values["prompt_schedule"])
    if not isinstance(values["endless"], bool):
        problems.append(f"endless is {request.endless!r}; give True or False")
    problems += _context_noise_problems(values["context_noise"])
    for name in ("prompt", "negative_prompt"):
        if not isinstance(values[name], str) and not (name == "negative_prompt" and values[name] is None):
            problems.append(f"{name} is {values[name]!r}; give one string (one request makes one video)")
    for name in ("image", "initial_noise", "text_embeddings", "continue_from"):
        value = values[name]
        if _is_path(value) and not pathlib.Path(value).is_file():
            problems.append(f"{name} is {os.fspath(value)!r}, but there is no such file; mend the path")
    return problems


def _whole_problems(name: str, value: object, least: int, most: int) -> list[str]:
    if value is None:
        return []
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # it raises TypeError for what is no whole number
    except TypeError:
        return [f"{name} is {value!r}; give a whole number"]
    return [] if least <= number <= most else [f"{name} is {number}; give a whole number from {least} to {most}"]


def _real_problems(name: str, value: object, low: float, high: float) -> list[str]:
    if value is None:
        return []
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    return [] if low <= number <= high else [f"{name} is {value!r}; give a number from {low:g} to {high:g}"]


def _context_noise_problems(value: object) -> list[str]:
    is_between = not _real_problems("context_noise", value, -1.0, 0.0) and value not in (None, -1.0, 0.0)
    if not is_between and not _real_problems("context_noise", value, -1.0, 1000.0):
        return []
    return [
        f"context_noise is {value!r}; give the timestep of the pass that shows finished blocks to later ones, "
        "0 (clean) to 1000, or -1 for no such pass"
    ]


def _step_list_problems(steps: object) -> list[str]:
    try:
        if steps is not None:
            step_sigmas(steps, warp=False)  # type: ignore[arg-type]  # it says in a sentence what is no list of numbers
    except UserError as error:
        return [str(error)]
    return []


def _is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike)


def _is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, tuple | list)


def _prompt_schedule_problems(schedule: object) -> list[str]:
    example = "give pairs of second and prompt with rising seconds above 0, such as ((5.0, 'a dog'), (10.0, 'a cat'))"
    if not _is_sequence(schedule):
        return [f"prompt_schedule is {schedule!r}; {example}"]
    before = 0.0
    for entry in schedule:
        if not _is_sequence(entry) or len(entry) != 2:
            return [f"prompt_schedule holds {entry!r}; {example}"]
        second, prompt = entry
        if not is_number(second) or not second > before:
            return [f"prompt_schedule has the second {second!r} after {before:g}; {example}"]
        if not isinstance(prompt, str) or not prompt.strip():
            return [f"prompt_schedule has the prompt {prompt!r} at {second:g} s; {example}"]
        before = float(second)
    return []


def schedule_problems(request: Request, schedule: Schedule, has_loras: bool) -> list[str]:
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
    problems: list[str] = []
    if request.uses_guidance:
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


def task_problems(request: Request, model: Model, allow_mismatch: bool = False) -> list[str]:
    problems: list[str] = []
    causal = model.schedule.causal is not None
    if model.variant in ("causvid", "self_forcing") and not causal:
        problems.append(
            f"the checkpoint's variant is {model.variant!r}, which makes videos block by block, but its schedule does "
            "not say how; convert it again"
        )
    if not causal:
        problems += whole_video_problems(request)
    if model.task == "i2v" and request.image is None:
        problems.append("image is missing, and this is an image-to-video checkpoint; give the path of an image")
    if model.task == "t2v" and request.image is not None and not causal:
        problems.append(
            "image is given, but this is a text-to-video checkpoint and would ignore it; leave it out or use an i2v one"
        )
    if model.task == "t2v" and request.pin_first_frame and not causal:
        problems.append("pin_first_frame is set, but this is a text-to-video checkpoint without an image; leave it out")
    problems += channel_problems(model)
    steps, count = request.denoising_step_list, request.num_inference_steps
    # Where the list is the checkpoint's own, `schedule_problems` has said it.
    is_own = steps is not None and tuple(steps) == model.schedule.denoising_step_list
    if steps is not None and count is not None and count != len(steps) and (not is_own or allow_mismatch):
        problems.append(
            f"num_inference_steps is {count}, but denoising_step_list has {len(steps)} entries; leave the number out"
        )
    if steps is not None and request.uses_guidance and not model.schedule.is_distilled:
        problems.append(
            f"guidance_scale is {request.guidance_scale:g} with a denoising_step_list, whose sampler has none; "
            "leave one of the two out"
        )
    return problems


def channel_problems(model: Model) -> list[str]:
    """A transformer whose channels are not those that noise, picture and VAE give: an earlier `convert` let it pass."""
    transformer, vae, image = model.config("transformer"), model.config("vae"), model.task == "i2v"
    given = vae.z_dim * 2 + vae.temporal_stride if image else vae.z_dim
    if (transformer.in_dim, transformer.out_dim) == (given, vae.z_dim):
        return []
    kind = relative_by_channels(transformer.in_dim, transformer.out_dim, image=image)
    return [
        f"the checkpoint's transformer takes {transformer.in_dim} channels and gives {transformer.out_dim}, and its "
        f"VAE is for {given} and {vae.z_dim}"
        + (f": it is {kind}, which this project does not run" if kind else "; convert both from one model")
    ]


def size_problems(size: tuple[int, int], num_frames: int, model: Model, size_rule: str = "published") -> list[str]:
    """Height, width and frame count that the strides of the VAE and the patches allow.

    Args:
        size: height and width in pixels.
        num_frames: does not matter block by block.
    """
    vae, patch = model.config("vae"), model.config("transformer").patch_size
    problems: list[str] = []
    for name, value, pixels in zip(("height", "width"), size, patch[1:], strict=True):
        step = vae.spatial_stride * pixels
        # The image gives an image-to-video clip its shape, so there only the product of the two matters.
        fits = (model.task == "i2v" and size_rule == "published") or value % step == 0
        problems += _multiple_problem(name, value, step, 0, fits and value >= step, f"multiples of {step}")
    if model.schedule.causal is not None:  # whole blocks: `request.causal` says which
        return problems
    step = vae.temporal_stride * patch[0]
    fits = (num_frames - 1) % step == 0
    problems += _multiple_problem("num_frames", num_frames, step, 1, fits, f"{step}n+1 frames")
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


def component_problems(request: Request, model: Model) -> list[str]:
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


def whole_video_problems(request: Request) -> list[str]:
    """Fields of block-by-block models, asked of a checkpoint that makes the video whole."""
    names = [name for name in _BLOCK_FIELDS if getattr(request, name) not in (None, False, ())]
    if not names:
        return []
    said = ", ".join(f"{name} is {getattr(request, name)!r}" for name in names)
    instead = "; its length is num_frames" if {"seconds", "endless"} & set(names) else ""
    return [
        f"{said}, but this checkpoint makes a video as a whole and not block by block{instead}: leave it out, or use "
        "a causal checkpoint (variant 'causvid' or 'self_forcing')"
    ]
