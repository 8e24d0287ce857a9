"""What one video is asked for, completed from the checkpoint and checked before anything is loaded. No jax import.

Names follow diffusers' WanPipeline. A field left at None is filled by `resolve` from the schedule that travels with the
checkpoint, and a request that contradicts that schedule is refused: a distilled model with guidance or with other
steps gives blurred or burnt video without any error.
"""

import dataclasses
import difflib
import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any, Self

from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, VaeConfig
from x2v_jax.request_checks import (
    MAX_SEED,
    Model,
    as_config,
    component_problems,
    field_problems,
    noise_level_problems,
    schedule_problems,
    size_problems,
    task_problems,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One video. None means "as the checkpoint's schedule says".

    image: a path, a PIL image or uint8 [H, W, 3]; image-to-video only. There, height x width is the area of the video
        and the image gives its shape (Wan's rule), so the result may have another height and width.
    pin_first_frame: replace the first latent frame by the encoded image after the last step. The published pipelines
        do not: the model keeps the image by itself, up to a slight change of colour.
    guidance_scale: velocity = uncond + scale (cond - uncond); 1 turns guidance off.
    shift: with a denoising_step_list on a base checkpoint, that is with a distillation LoRA, None means 5: the
        published LoRAs were trained with it, whatever shift their base model is sampled with.
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

    @classmethod
    def of(cls, prompt: str, fields: Mapping[str, Any]) -> Self:
        """A request from a prompt and fields by name.

        Raises:
            UserError: an unknown field, with the nearest known one.
        """
        for name in fields:
            if name not in cls.field_names():
                near = difflib.get_close_matches(name, cls.field_names(), 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.field_names())}"
                raise UserError(f"unknown field {name!r}; {hint}")
        return cls(prompt=prompt, **fields)


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
    problems = field_problems(request) + component_problems(request, model)
    if problems:  # wrong types and missing networks would make the later checks raise errors of their own
        raise UserError(_join(problems))
    if not allow_mismatch:
        problems += schedule_problems(request, schedule, has_loras)
    problems += task_problems(request, model)
    resolved = _fill(request, schedule)
    problems += size_problems(resolved, model)
    problems += noise_level_problems(resolved)
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


def _fill(request: Request, schedule: Schedule) -> Request:
    steps = None if request.denoising_step_list is None else tuple(request.denoising_step_list)
    if steps is None and not _asks_for_unipc(request, schedule):
        steps = schedule.denoising_step_list
    brings_steps = steps is not None and not schedule.is_distilled
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
        shift=float(_or(request.shift, Schedule.shift if brings_steps else schedule.shift)),
        denoising_step_list=steps,
        warp_denoising_step=bool(warp),
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else int(request.seed),
    )


def _asks_for_unipc(request: Request, schedule: Schedule) -> bool:
    # Only reached with allow_mismatch: another number of steps on a distilled checkpoint cannot mean its list.
    steps, trained = request.num_inference_steps, schedule.denoising_step_list
    return steps is not None and trained is not None and steps != len(trained)


def _unipc_steps(schedule: Schedule) -> int:
    return schedule.num_inference_steps if not schedule.is_distilled else Schedule.num_inference_steps


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _warn(request: Request, resolved: Request) -> None:
    if not resolved.prompt.strip() and resolved.text_embeddings is None:
        warnings.warn("prompt is empty: the video will show whatever the model likes", stacklevel=3)
    if request.negative_prompt and not resolved.is_guided:
        warnings.warn("negative_prompt has no effect without guidance (guidance_scale is 1)", stacklevel=3)


def _join(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with the request:\n" + "\n".join(f"  - {problem}" for problem in problems)
