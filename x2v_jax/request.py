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

from x2v_jax import request_rollout
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, VaeConfig
from x2v_jax.request_checks import (
    MAX_SEED,
    Model,
    component_problems,
    field_problems,
    noise_level_problems,
    schedule_problems,
    size_problems,
    task_problems,
)
from x2v_jax.request_fields import as_config


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

    For checkpoints that make a video block by block (Schedule.causal). There num_frames is 4n+1 for whole blocks of
    latent frames (9, 21, 33, … for blocks of 3), and a multiple of 4 blocks where it continues a video.

    image: the first frame of the video, scaled to fill height x width and cropped at the sides that stick out. A model
        whose first frame is a block of its own takes it as that block. Others take whole blocks only: the picture is
        held still for the first block (9 frames of a block of 3), which is part of the video.
    rollout_mode: how the video goes on past rollout_window: "full" does not, "sliding" forgets the oldest frames,
        "fragments" starts cache and positions again from the last block; see `rollout_plan.RolloutPlan`.
    rollout_window, rollout_sink: latent frames that the network sees at most, and of these the first ones of the video
        that are never forgotten ("sliding" only).
    rollout_positions: "relative" or "absolute" positions of the sink.
    context_noise: timestep at which a finished block is shown to later ones, 0 to 1000; -1: they see it as its last
        step left it, noisy (LightX2V).
    seconds: the length, rounded up to whole blocks, instead of num_frames. endless: until the caller stops.
    continue_from: safetensors file of an earlier `save_latents` of this model and size, or an mp4 of this size, whose
        frames are encoded. Its last blocks are what the network sees first; they are not part of the new video.
    prompt_schedule: (second, prompt) pairs: the prompt of the first block that starts at that second of the new video
        or later, and of the blocks after it. What the network sees of the video is then shown to it again under the
        new prompt (LongLive, arXiv:2509.22622).
    kv_cache: what keys and values are kept in, "bfloat16", "float32", "int8" or "int8_e4m3" (int8 keys, float8 values);
        None: as the network computes.
    num_fragments, num_frame_per_block, num_blocks, frame_seq_length: LightX2V's names for the number of windows of a
        "fragments" video, the latent frames of a block, the blocks of a window, and the tokens of a latent frame.
        They are checked against the checkpoint and the size.
    save_latents of an endless video keeps what a continuation needs: the last blocks.
    initial_noise: `noise` [blocks, frames, C, H, W] and optionally `renoise` [blocks, steps - 1, frames, C, H, W], for
        the blocks that are made (not for the image); of a first block of one frame, the first frame counts.
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
    rollout_mode: str | None = None
    rollout_window: int | None = None
    rollout_sink: int | None = None
    rollout_positions: str | None = None
    context_noise: float | None = None
    seconds: float | None = None
    endless: bool = False
    continue_from: str | os.PathLike[str] | None = None
    prompt_schedule: tuple[tuple[float, str], ...] = ()
    kv_cache: str | None = None
    num_fragments: int | None = None
    num_frame_per_block: int | None = None
    num_blocks: int | None = None
    frame_seq_length: int | None = None

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
    vae = as_config(VaeConfig, model.config("vae"))
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


def _or(value: object, default: object) -> Any:
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
