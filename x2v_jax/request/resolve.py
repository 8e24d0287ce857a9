"""What is asked -> what is decided: a request completed from the checkpoint's schedule, and checked. No jax import.

A request that contradicts that schedule is refused: a distilled model with guidance or with other steps gives blurred
or burnt video without any error.
"""

import dataclasses
import os
import re
import secrets
import warnings
from typing import Literal

from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import Levels, step_sigmas, step_timesteps, unipc_schedule
from x2v_jax.errors import UserError
from x2v_jax.models.config import NEGATIVE_PROMPTS, Schedule
from x2v_jax.request import causal
from x2v_jax.request.checks import (
    component_problems,
    field_problems,
    schedule_problems,
    size_problems,
    task_problems,
)
from x2v_jax.request.inputs import BlockInputs, InputFiles, Inputs
from x2v_jax.request.request import Model, Request

_LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)
_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Shorter than seeds may be: a number to read out and type.
_DRAWN_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class WholePlan:
    """How a video whose frames are all made together is sampled.

    sampler: "step_distill" (predict x0, add noise, repeat) or "unipc".
    sigmas: the noise level that each step starts from, falling.
    shift: what the levels were shifted by.
    timesteps: what the network is asked at in each step, where that is not 1000 * sigma.
    """

    sampler: Literal["step_distill", "unipc"]
    sigmas: tuple[float, ...]
    shift: float
    timesteps: tuple[float, ...] | None = None


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
    def num_inference_steps(self) -> int:
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
            self.inputs.noise(shape, self.num_inference_steps if self.plan.sampler == "step_distill" else None)


def resolve(
    request: object,
    model: Model,
    *,
    files: InputFiles | None = None,
    has_loras: bool = False,
    distilled_by: str = "",
    allow_mismatch: bool = False,
) -> ResolvedRequest:
    """Decides every field from the checkpoint's schedule and checks it. Files are opened later, when they are needed.

    Args:
        request: a `Request`.
        model: the checkpoint.
        files: what other requests of the run have opened; None: nothing.
        has_loras: LoRAs are merged at load. They may turn the base model into a distilled one, so a
            denoising_step_list on a checkpoint that has none is then accepted.
        distilled_by: the one of them whose name says that it distills; "" for none.
        allow_mismatch: run settings that contradict the checkpoint's schedule.

    Raises:
        UserError: one sentence for each problem found, all together.
    """
    if not isinstance(request, Request):
        raise UserError(
            f"generate takes a Request, and {str(request)[:60]!r} is a {type(request).__name__}; write "
            "generate(Request(prompt='a cat', seed=1)), or call the pipeline itself: pipe('a cat', seed=1)"
        )
    schedule = model.schedule
    if isinstance(request.negative_prompt, str) and request.negative_prompt in NEGATIVE_PROMPTS:
        request = dataclasses.replace(request, negative_prompt=NEGATIVE_PROMPTS[request.negative_prompt])
    problems = field_problems(request) + component_problems(request, model)
    if problems:  # wrong types and missing networks would make the later checks raise errors of their own
        raise UserError(_join(problems))
    if not allow_mismatch:
        problems += schedule_problems(request, schedule, has_loras)
    problems += task_problems(request, model, allow_mismatch)
    if schedule.causal is not None:
        problems += causal.conflict_problems(request, model, schedule.causal, allow_mismatch)
    sampling = _Sampling.of(request, schedule)
    size = _or(request.height, schedule.height), _or(request.width, schedule.width)
    num_frames, fps = _or(request.num_frames, schedule.num_frames), _or(request.fps, schedule.fps)
    seed = secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else int(request.seed)
    completed = dataclasses.replace(
        sampling.written_into(request, schedule),
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        fps=fps,
        seed=seed,
    )
    problems += size_problems(size, num_frames, model, request.size_rule)
    sigmas: tuple[float, ...] = ()
    try:
        sigmas = sampling.sigmas()
    except UserError as error:
        problems.append(str(error))
    sampler, timesteps = ("step_distill" if sampling.steps else "unipc"), sampling.timesteps()
    plan: WholePlan | RolloutPlan = WholePlan(sampler, sigmas, sampling.shift, timesteps)
    latent_frames = (num_frames - 1) // model.config("vae").temporal_stride + 1
    if schedule.causal is not None:
        settings = causal.decide(request, fps, model, schedule.causal)
        completed = settings.written_into(completed)
        if not problems:
            has_steps = bool(sampling.steps)
            problems += causal.rollout_problems(request, settings, size, has_steps, model, schedule.causal)
        if not problems:
            plan = settings.plan(sigmas, timesteps, schedule.causal)
            num_frames, latent_frames = settings.num_frames, settings.latent_frames or settings.window
    if problems:
        raise UserError(_join(problems))
    _warn(request, completed)
    _warn_of_distillation(distilled_by, completed, schedule)
    later = tuple((float(second), text) for second, text in request.prompt_schedule)
    before = (completed.negative_prompt or "",) if completed.uses_guidance else ()
    return ResolvedRequest(
        prompts=(*before, request.prompt, *(text for _, text in later)),
        prompt_schedule=later,
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        latent_frames=latent_frames,
        latent_channels=model.config("vae").z_dim,
        fps=fps,
        seed=seed,
        guidance_scale=sampling.guidance_scale,
        pin_first_frame=request.pin_first_frame,
        kv_cache=request.kv_cache or "",
        save_latents=os.fspath(request.save_latents or ""),
        plan=plan,
        inputs=Inputs(request, size, model, InputFiles() if files is None else files, allow_mismatch),
        completed=completed,
    )


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """How the noise is taken away. steps: timesteps of the step-distill sampler, none for UniPC; the rest as asked."""

    steps: tuple[float, ...]
    count: int
    shift: float
    warp: bool
    guidance_scale: float
    levels: Levels

    @classmethod
    def of(cls, request: Request, schedule: Schedule) -> "_Sampling":
        steps = None if request.denoising_step_list is None else tuple(request.denoising_step_list)
        if steps is None and not _asks_for_unipc(request, schedule):
            steps = schedule.denoising_step_list
        brings_steps = steps is not None and not schedule.is_distilled
        warp = request.warp_denoising_step
        if warp is None:
            warp = schedule.warp_denoising_step if steps == schedule.denoising_step_list else True
        shift = _or(request.shift, Schedule.shift if brings_steps else schedule.shift)
        guidance = _or(request.guidance_scale, schedule.guidance_scale if steps is None else 1.0)
        count = _or(request.num_inference_steps, _unipc_steps(schedule)) if steps is None else len(steps)
        return cls(steps or (), count, float(shift), bool(warp), float(guidance), schedule.levels)

    def sigmas(self) -> tuple[float, ...]:
        """The noise level that each step starts from.

        Raises:
            UserError: two steps are at one level, or there is no signal at the first.
        """
        if self.steps:
            levels = step_sigmas(self.steps, self.shift, warp=self.warp, levels=self.levels)
        else:
            levels = unipc_schedule(self.count, self.shift)[0][:-1]
        return tuple(float(sigma) for sigma in levels)

    def timesteps(self) -> tuple[float, ...] | None:
        """What the network is asked at in each step, where that is not 1000 * sigma."""
        return step_timesteps(self.steps, warp=self.warp, levels=self.levels) if self.steps else None

    def written_into(self, request: Request, schedule: Schedule) -> Request:
        return dataclasses.replace(
            request,
            negative_prompt=_or(
                request.negative_prompt, schedule.negative_prompt if self.guidance_scale != 1.0 else ""
            ),
            num_inference_steps=self.count,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            denoising_step_list=self.steps or None,
            warp_denoising_step=self.warp,
        )


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
        _say("prompt is empty: the video will show whatever the model likes")
    if found := _LORA_TAG.search(request.prompt):
        _say(
            f"prompt holds {found.group()[:60]!r}, which is read as words; give LoRAs with --config.lora=FILE:0.8, or "
            "in Python with loras="
        )
    if request.negative_prompt and not completed.uses_guidance:
        _say("negative_prompt has no effect without guidance (guidance_scale is 1)")


def _say(text: str) -> None:
    """A warning that points at the line of the user's which asked."""
    warnings.warn(text, skip_file_prefixes=(_LIBRARY,))


def _warn_of_distillation(lora: str, completed: Request, schedule: Schedule) -> None:
    if lora and schedule.is_distilled:
        _say(
            f"the name of {lora} says that it distills, and the checkpoint is distilled already: twice is too much. "
            "Leave the LoRA out, or put it on the original model"
        )
    elif lora and completed.denoising_step_list is None:
        _say(
            f"the name of {lora} says that it distills, and this video is made in {completed.num_inference_steps} "
            "steps of the original model; give its denoising_step_list, such as 1000,750,500,250"
        )


def _join(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with the request:\n" + "\n".join(f"  - {problem}" for problem in problems)
