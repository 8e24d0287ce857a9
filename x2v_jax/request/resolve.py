"""What is asked -> what is decided: a request completed from the checkpoint's schedule, and checked. No jax import.

A request that contradicts that schedule is refused: a distilled model with guidance or with other steps gives blurred
or burnt video without any error.
"""

import dataclasses
import os
import secrets
import warnings
from typing import Literal

from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import step_sigmas, unipc_schedule
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule
from x2v_jax.request import causal
from x2v_jax.request.checks import (
    MAX_SEED,
    component_problems,
    field_problems,
    schedule_problems,
    size_problems,
    task_problems,
)
from x2v_jax.request.inputs import BlockInputs, InputFiles, Inputs
from x2v_jax.request.model import Model
from x2v_jax.request.request import Request


@dataclasses.dataclass(frozen=True)
class WholePlan:
    """How a video whose frames are all made together is sampled.

    sampler: "step_distill" (predict x0, add noise, repeat) or "unipc".
    sigmas: the noise level that each step starts from, falling.
    shift: what the levels were shifted by.
    """

    sampler: Literal["step_distill", "unipc"]
    sigmas: tuple[float, ...]
    shift: float


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """One video as it will be made: nothing is left open. `resolve` makes it.

    prompts: the texts to encode: with guidance the negative prompt first, the prompt, and those of prompt_schedule.
    prompt_schedule: as in `Request`.
    height, width: in pixels; for image-to-video their product counts, and `latent_shape` says the size.
    num_frames: of the video; 0 where it is endless.
    latent_frames: of the latents; of an endless video, those of the network's window.
    latent_channels: of the VAE.
    fps, seed, guidance_scale, pin_first_frame: as in `Request`.
    kv_cache: as in `Request`; "" for as the network computes.
    save_latents: the file; "" for none.
    plan: of the whole video, or of the rollout block by block.
    inputs: the files that it names.
    completed: the request with every field filled that the checkpoint decides: what a video records of itself.
    """

    prompts: tuple[str, ...]
    prompt_schedule: tuple[tuple[float, str], ...]
    height: int
    width: int
    num_frames: int
    latent_frames: int
    latent_channels: int
    fps: int
    seed: int
    guidance_scale: float
    pin_first_frame: bool
    kv_cache: str
    save_latents: str
    plan: WholePlan | RolloutPlan
    inputs: Inputs
    completed: Request

    @property
    def prompt(self) -> str:
        return self.completed.prompt

    @property
    def negative_prompt(self) -> str:
        return self.completed.negative_prompt or ""

    @property
    def endless(self) -> bool:
        return not self.num_frames

    @property
    def uses_guidance(self) -> bool:
        return self.completed.uses_guidance

    @property
    def num_steps(self) -> int:
        """Denoising steps, of the video or of each block."""
        return len(self.plan.sigmas)

    @property
    def num_blocks(self) -> int | None:
        """Blocks of a block-by-block video, one that is the first frame alone not counted; None: endless."""
        if self.endless or not isinstance(self.plan, RolloutPlan):
            return None
        return -(-self.latent_frames // self.plan.block)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[frames, height, width, channels]. Block by block, without the frames that the video continues.

        Raises:
            UserError: the picture that decides the size cannot be read, or is too long for the area.
        """
        return self.latent_frames, *self.inputs.latent_size(), self.latent_channels

    def block_inputs(self, plan: RolloutPlan) -> BlockInputs:
        """What a block-by-block video starts from; see `Inputs.blocks`."""
        return self.inputs.blocks(plan, 0 if self.endless else self.latent_frames)

    def open_inputs(self) -> None:
        """Reads every file that is named, so that one that does not fit is said before anything is loaded.

        Raises:
            UserError: a file does not fit, or is damaged.
        """
        self.inputs.text()
        shape = self.latent_shape
        if isinstance(self.plan, RolloutPlan):
            self.block_inputs(self.plan)
        else:
            self.inputs.noise(shape, self.num_steps if self.plan.sampler == "step_distill" else None)


def resolve(
    request: Request,
    model: Model,
    *,
    files: InputFiles | None = None,
    has_loras: bool = False,
    allow_mismatch: bool = False,
) -> ResolvedRequest:
    """Decides every field from the checkpoint's schedule and checks it. Files are opened later, when they are needed.

    Args:
        model: the checkpoint.
        files: what other requests of the run have opened; None: nothing.
        has_loras: LoRAs are merged at load. They may turn the base model into a distilled one, so a
            denoising_step_list on a checkpoint that has none is then accepted.
        allow_mismatch: run settings that contradict the checkpoint's schedule.

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
    if schedule.causal is not None:
        problems += causal.conflict_problems(request, model, schedule.causal, allow_mismatch)
    steps, shift, warp = _noise_levels(request, schedule)
    count = len(steps) or _or(request.num_inference_steps, _unipc_steps(schedule))
    guidance = float(_or(request.guidance_scale, 1.0 if steps else schedule.guidance_scale))
    size = _or(request.height, schedule.height), _or(request.width, schedule.width)
    num_frames, fps = _or(request.num_frames, schedule.num_frames), _or(request.fps, schedule.fps)
    completed = dataclasses.replace(
        request,
        negative_prompt=_or(request.negative_prompt, schedule.negative_prompt if guidance != 1.0 else ""),
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=count,
        guidance_scale=guidance,
        shift=shift,
        denoising_step_list=steps or None,
        warp_denoising_step=warp,
        seed=(seed := secrets.randbelow(MAX_SEED + 1) if request.seed is None else int(request.seed)),
    )
    problems += size_problems(size, num_frames, model)
    sigmas: tuple[float, ...] = ()
    try:  # two steps at one noise level, or no signal at the first step, only show where shift and steps meet
        sigmas = _sigmas(steps, count, shift, warp)
    except UserError as error:
        problems.append(str(error))
    settings = None
    if schedule.causal is not None:
        settings = causal.decide(request, fps, model, schedule.causal)
        completed = settings.written_into(completed)
        if not problems:
            problems += causal.rollout_problems(request, settings, size, bool(steps), model, schedule.causal)
    if problems:
        raise UserError(_join(problems))
    _warn(request, completed)
    vae = model.config("vae")
    if settings is None or schedule.causal is None:
        plan: WholePlan | RolloutPlan = WholePlan("step_distill" if steps else "unipc", sigmas, shift)
        latent_frames = (num_frames - 1) // vae.temporal_stride + 1
    else:
        plan = settings.plan(sigmas, schedule.causal)
        num_frames, latent_frames = settings.num_frames, settings.latent_frames or settings.window
    later = tuple((float(second), text) for second, text in request.prompt_schedule)
    before = (completed.negative_prompt or "",) if completed.uses_guidance else ()
    return ResolvedRequest(
        prompts=(*before, request.prompt, *(text for _, text in later)),
        prompt_schedule=later,
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        latent_frames=latent_frames,
        latent_channels=vae.z_dim,
        fps=fps,
        seed=seed,
        guidance_scale=guidance,
        pin_first_frame=request.pin_first_frame,
        kv_cache=request.kv_cache or "",
        save_latents=os.fspath(request.save_latents or ""),
        plan=plan,
        inputs=Inputs(request, size, model, InputFiles() if files is None else files, allow_mismatch),
        completed=completed,
    )


def _noise_levels(request: Request, schedule: Schedule) -> tuple[tuple[float, ...], float, bool]:
    """Timesteps of the step-distill sampler (none for UniPC), shift, and whether it still applies to them."""
    steps = None if request.denoising_step_list is None else tuple(request.denoising_step_list)
    if steps is None and not _asks_for_unipc(request, schedule):
        steps = schedule.denoising_step_list
    brings_steps = steps is not None and not schedule.is_distilled
    warp = request.warp_denoising_step
    if warp is None:
        warp = schedule.warp_denoising_step if steps == schedule.denoising_step_list else True
    shift = float(_or(request.shift, Schedule.shift if brings_steps else schedule.shift))
    return steps or (), shift, bool(warp)


def _sigmas(steps: tuple[float, ...], count: int, shift: float, warp: bool) -> tuple[float, ...]:
    levels = step_sigmas(steps, shift, warp=warp) if steps else unipc_schedule(count, shift)[0][:-1]
    return tuple(float(sigma) for sigma in levels)


def _asks_for_unipc(request: Request, schedule: Schedule) -> bool:
    # Only reached with allow_mismatch: another number of steps on a distilled checkpoint cannot mean its list.
    steps, trained = request.num_inference_steps, schedule.denoising_step_list
    return steps is not None and trained is not None and steps != len(trained)


def _unipc_steps(schedule: Schedule) -> int:
    return schedule.num_inference_steps if not schedule.is_distilled else Schedule.num_inference_steps


def _or[T](value: T | None, default: T) -> T:
    return default if value is None else value


def _warn(request: Request, completed: Request) -> None:
    if not request.prompt.strip() and request.text_embeddings is None:
        warnings.warn("prompt is empty: the video will show whatever the model likes", stacklevel=3)
    if request.negative_prompt and not completed.uses_guidance:
        warnings.warn("negative_prompt has no effect without guidance (guidance_scale is 1)", stacklevel=3)


def _join(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with the request:\n" + "\n".join(f"  - {problem}" for problem in problems)
