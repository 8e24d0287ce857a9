"""A request completed from the schedule that travels with the checkpoint, and checked. No jax import.

A request that contradicts that schedule is refused: a distilled model with guidance or with other steps gives blurred
or burnt video without any error.
"""

import dataclasses
import secrets
import warnings
from typing import Any

from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule
from x2v_jax.request import causal as request_rollout
from x2v_jax.request.checks import (
    MAX_SEED,
    component_problems,
    field_problems,
    noise_level_problems,
    schedule_problems,
    size_problems,
    task_problems,
)
from x2v_jax.request.model import Model
from x2v_jax.request.request import Request


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
    causal = schedule.causal
    if causal is not None:
        problems += request_rollout.conflict_problems(request, model, causal, allow_mismatch)
    resolved = _fill(request, schedule)
    if causal is not None:
        resolved = request_rollout.fill(dataclasses.replace(resolved, num_frames=request.num_frames), model, causal)
    problems += size_problems(resolved, model)
    problems += noise_level_problems(resolved)
    if causal is not None and not problems:
        problems += request_rollout.rollout_problems(resolved, model, causal)
    if problems:
        raise UserError(_join(problems))
    _warn(request, resolved)
    return resolved if causal is None else request_rollout.settled(resolved)


def latent_shape(request: Request, model: Model) -> tuple[int, int, int, int]:
    """Text-to-video: [frames, height, width, channels] of the latents of a resolved request.

    Block by block, these are the frames of the video without those that it continues, and of an endless one those of a
    window.
    """
    assert request.height and request.width  # resolved
    vae = model.config("vae")
    if model.schedule.causal is not None:
        frames = request_rollout.new_latent_frames(request, model) or request.rollout_window
    else:
        assert request.num_frames  # resolved
        frames = (request.num_frames - 1) // vae.temporal_stride + 1
    assert frames
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
