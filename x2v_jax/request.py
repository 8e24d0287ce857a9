"""What one video is asked for, completed from the checkpoint and checked before anything is loaded. No jax import.

Names follow diffusers' WanPipeline. A field left at None is filled by `resolve` from the schedule that travels with the
checkpoint, and a request that contradicts that schedule is refused: a distilled model with guidance or with other
steps gives blurred or burnt video without any error.
"""

import dataclasses
import math
import operator
import os
import pathlib
import secrets
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from x2v_jax.diffusion.schedules import step_sigmas, unipc_schedule
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, VaeConfig, WanConfig

# Positions per axis for which the published models have rotary angles.
_MAX_POSITIONS = 1024
# jax.random.key takes 32 bits: seeds that differ by 2^32 would give the same video.
_MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One video. None means "as the checkpoint's schedule says".

    image: a path, a PIL image or uint8 [H, W, 3]; image-to-video only. There, height x width is the area of the video
        and the image gives its shape (Wan's rule), so the result may have another height and width.
    pin_first_frame: replace the first latent frame by the encoded image after the last step. The published pipelines
        do not: the model keeps the image by itself, up to a slight change of colour.
    guidance_scale: velocity = uncond + scale (cond - uncond); 1 turns guidance off.
    denoising_step_list: timesteps above 0 and at most 1000, falling; given, it selects the step-distill sampler.
    warp_denoising_step: whether `shift` is still to be applied to that list.
    seed: 0..2^32 - 1; None draws one (the resolved request holds it).
    initial_noise: safetensors file with `noise` [C, F, H, W] and optionally `renoise` [steps - 1, C, F, H, W].
    text_embeddings: safetensors file with `text` [L, D] and, for guidance, `negative_text`; replaces the text encoder.
    save_latents: file to write `latents` [C, F, H, W] to, as they are before the VAE.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    image: Any = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    denoising_step_list: tuple[float, ...] | None = None
    warp_denoising_step: bool | None = None
    seed: int | None = None
    pin_first_frame: bool = False
    initial_noise: str | os.PathLike[str] | None = None
    text_embeddings: str | os.PathLike[str] | None = None
    save_latents: str | os.PathLike[str] | None = None

    @property
    def is_step_distill(self) -> bool:
        return self.denoising_step_list is not None

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale is not None and self.guidance_scale != 1.0

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))


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


def resolve(request: Request, model: Model, *, has_loras: bool = False, allow_mismatch: bool = False) -> Request:
    """Fills the request from the checkpoint's schedule and checks every field.

    Args:
        request: fields at None are filled.
        model: the checkpoint.
        has_loras: LoRAs are merged at load. They may turn the base model into a distilled one, so a
            denoising_step_list on a checkpoint that has none is then accepted.
        allow_mismatch: run settings that contradict the checkpoint's schedule.

    Returns:
        A request without None in the fields that sampling needs.

    Raises:
        UserError: one sentence for each problem found, all together.
    """
    schedule = model.schedule
    problems = _field_problems(request) + _component_problems(request, model)
    if problems:  # wrong types and missing networks would make the later checks raise errors of their own
        raise UserError(_join(problems))
    if not allow_mismatch:
        problems += _schedule_problems(request, schedule, has_loras)
    problems += _task_problems(request, model)
    resolved = _fill(request, schedule)
    problems += _size_problems(resolved, model)
    problems += _noise_level_problems(resolved)
    if problems:
        raise UserError(_join(problems))
    _warn(request, resolved)
    return resolved


def latent_shape(request: Request, model: Model) -> tuple[int, int, int, int]:
    """Text-to-video: [frames, height, width, channels] of the latents of a resolved request."""
    assert request.height and request.width and request.num_frames  # resolved
    vae = as_config(VaeConfig, model.config("vae"))
    frames = (request.num_frames - 1) // vae.temporal_stride + 1
    return frames, request.height // vae.spatial_stride, request.width // vae.spatial_stride, vae.z_dim


def as_config(cls: type, value: Any) -> Any:
    return value if isinstance(value, cls) else cls.from_dict(value)


def _fill(request: Request, schedule: Schedule) -> Request:
    steps = request.denoising_step_list
    if steps is None and not _asks_for_unipc(request, schedule):
        steps = schedule.denoising_step_list
    warp = request.warp_denoising_step
    if warp is None:
        warp = schedule.warp_denoising_step if steps == schedule.denoising_step_list else True
    guidance = request.guidance_scale
    if guidance is None:
        guidance = 1.0 if steps is not None else schedule.guidance_scale
    count = _or(request.num_inference_steps, _unipc_steps(schedule)) if steps is None else len(steps)
    negative = request.negative_prompt
    if negative is None:
        negative = schedule.negative_prompt if guidance != 1.0 else ""
    return dataclasses.replace(
        request,
        negative_prompt=negative,
        height=_or(request.height, schedule.height),
        width=_or(request.width, schedule.width),
        num_frames=_or(request.num_frames, schedule.num_frames),
        fps=_or(request.fps, schedule.fps),
        num_inference_steps=count,
        guidance_scale=float(guidance),
        shift=float(_or(request.shift, schedule.shift)),
        denoising_step_list=None if steps is None else tuple(steps),
        warp_denoising_step=bool(warp),
        seed=secrets.randbelow(_MAX_SEED + 1) if request.seed is None else int(request.seed),
    )


def _asks_for_unipc(request: Request, schedule: Schedule) -> bool:
    # Only reached with allow_mismatch: another number of steps on a distilled checkpoint cannot mean its list.
    steps, trained = request.num_inference_steps, schedule.denoising_step_list
    return steps is not None and trained is not None and steps != len(trained)


def _unipc_steps(schedule: Schedule) -> int:
    return schedule.num_inference_steps if not schedule.is_distilled else Schedule.num_inference_steps


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _field_problems(request: Request) -> list[str]:
    """Types and ranges that hold for every model."""
    problems = [
        *_whole(request, "height", 1, 1 << 20),
        *_whole(request, "width", 1, 1 << 20),
        *_whole(request, "num_frames", 1, 1 << 20),
        *_whole(request, "fps", 1, 240),
        *_whole(request, "num_inference_steps", 1, 1000),
        *_whole(request, "seed", 0, _MAX_SEED),
        *_real(request, "guidance_scale", 0.0, 100.0),
        *_real(request, "shift", 0.01, 100.0),
        *_step_list_problems(request.denoising_step_list),
    ]
    for name in ("prompt", "negative_prompt"):
        value = getattr(request, name)
        if not isinstance(value, str) and not (name == "negative_prompt" and value is None):
            problems.append(f"{name} is {value!r}; give one string (one request makes one video)")
    for name in ("image", "initial_noise", "text_embeddings"):
        value = getattr(request, name)
        if isinstance(value, str | os.PathLike) and not pathlib.Path(value).is_file():
            problems.append(f"{name} is {os.fspath(value)!r}, but there is no such file; mend the path")
    return problems


def _whole(request: Request, name: str, low: int, high: int) -> list[str]:
    value = getattr(request, name)
    if value is None:
        return []
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        return [f"{name} is {value!r}; give a whole number"]
    return [] if low <= number <= high else [f"{name} is {number}; give a whole number from {low} to {high}"]


def _real(request: Request, name: str, low: float, high: float) -> list[str]:
    value = getattr(request, name)
    if value is None:
        return []
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return [] if low <= number <= high else [f"{name} is {value!r}; give a number from {low:g} to {high:g}"]


def _step_list_problems(steps: Sequence[float] | None) -> list[str]:
    try:
        if steps is not None:
            step_sigmas(steps, warp=False)
    except UserError as error:
        return [str(error)]
    return []


def _schedule_problems(request: Request, schedule: Schedule, has_loras: bool) -> list[str]:
    """Settings that contradict what the checkpoint was trained for."""
    anyway = "or pass allow_mismatch=True to run it anyway"
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


def _task_problems(request: Request, model: Model) -> list[str]:
    problems = []
    if model.variant in ("causvid", "self_forcing"):
        problems.append(
            f"the checkpoint's variant is {model.variant!r}, an autoregressive model, which this pipeline does not "
            "sample; use a checkpoint of variant 'base' or 'distill'"
        )
    if model.task == "i2v" and request.image is None:
        problems.append("image is missing, and this is an image-to-video checkpoint; give the path of an image")
    if model.task == "t2v" and request.image is not None:
        problems.append(
            "image is given, but this is a text-to-video checkpoint and would ignore it; leave it out or use an i2v one"
        )
    if model.task == "t2v" and request.pin_first_frame:
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


def _size_problems(request: Request, model: Model) -> list[str]:
    """Height, width and frame count that the strides of the VAE and the patches allow (`request` is filled)."""
    vae = as_config(VaeConfig, model.config("vae"))
    patch = as_config(WanConfig, model.config("transformer")).patch_size
    problems = []
    for name, step in (("height", vae.spatial_stride * patch[1]), ("width", vae.spatial_stride * patch[2])):
        value = getattr(request, name)
        # The image gives an image-to-video clip its shape, so there only the product of the two matters.
        fits = model.task == "i2v" or value % step == 0
        problems += _multiple_problem(name, value, step, 0, fits and value >= step, f"multiples of {step}")
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


def _noise_level_problems(request: Request) -> list[str]:
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


def _component_problems(request: Request, model: Model) -> list[str]:
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


def _warn(request: Request, resolved: Request) -> None:
    if not resolved.prompt.strip() and resolved.text_embeddings is None:
        warnings.warn("prompt is empty: the video will show whatever the model likes", stacklevel=3)
    if request.negative_prompt and not resolved.is_guided:
        warnings.warn("negative_prompt has no effect without guidance (guidance_scale is 1)", stacklevel=3)


def _join(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with the request:\n" + "\n".join(f"  - {problem}" for problem in problems)
