"""Block-by-block fields of a request: completed from the checkpoint's CausalSchedule, and checked. No jax import.

Requests count pixel frames, the network latent frames. A video from nothing has 4n+1 pixel frames for n+1 latent ones;
the frames that a continuation adds are 4 for each latent frame.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

from x2v_jax.diffusion.rollout_plan import Mode, Positions, RolloutPlan
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import is_number
from x2v_jax.models.causal import MAX_FRAMES
from x2v_jax.models.config import CausalSchedule
from x2v_jax.request.fields import choice_problems, real_problems, whole_problems
from x2v_jax.request.model import Model
from x2v_jax.request.request import Request

# How `Request.context_noise` says that there is no clean pass.
NO_CONTEXT_PASS = -1.0
KV_CACHES = ("bfloat16", "float32", "int8", "int8_e4m3")
# LightX2V's names for what mode, window and size say too: checked, then said in our own terms.
_SAID_OTHERWISE = ("num_fragments", "num_blocks", "frame_seq_length")
_FIELDS = (
    "rollout_mode", "rollout_window", "rollout_sink", "rollout_positions", "context_noise", "seconds", "endless",
    "continue_from", "prompt_schedule", "kv_cache", "num_frame_per_block", *_SAID_OTHERWISE,
)  # fmt: skip
_MOST = 1 << 20


def given_fields(request: Request) -> list[str]:
    """Names of the fields that only block-by-block models have and that this request sets."""
    return [name for name in _FIELDS if getattr(request, name) not in (None, False, ())]


def type_problems(request: Request) -> list[str]:
    """Types and ranges that hold for every model."""
    problems = [
        *choice_problems(request, "rollout_mode", get_args(Mode)),
        *choice_problems(request, "rollout_positions", get_args(Positions)),
        *choice_problems(request, "kv_cache", KV_CACHES),
        *whole_problems(request, "rollout_window", 1, _MOST),
        *whole_problems(request, "rollout_sink", 0, _MOST),
        *whole_problems(request, "num_fragments", 1, _MOST),
        *whole_problems(request, "num_frame_per_block", 1, _MOST),
        *whole_problems(request, "num_blocks", 1, _MOST),
        *whole_problems(request, "frame_seq_length", 1, 1 << 30),
        *real_problems(request, "seconds", 0.001, 1e7),
        *_schedule_problems(request.prompt_schedule),
    ]
    if not isinstance(request.endless, bool):
        problems.append(f"endless is {request.endless!r}; give True or False")
    context = real_problems(request, "context_noise", -1.0, 1000.0)
    if not context and request.context_noise is not None and -1.0 < request.context_noise < 0.0:
        context = [f"context_noise is {request.context_noise:g}"]
    if context:
        problems.append(
            f"context_noise is {request.context_noise!r}; give the timestep of the pass that shows finished blocks to "
            "later ones, 0 (clean) to 1000, or -1 for no such pass"
        )
    return problems


def _schedule_problems(schedule: Any) -> list[str]:
    example = "give pairs of second and prompt with rising seconds above 0, such as ((5.0, 'a dog'), (10.0, 'a cat'))"
    if not isinstance(schedule, tuple | list):
        return [f"prompt_schedule is {schedule!r}; {example}"]
    before = 0.0
    for entry in schedule:
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            return [f"prompt_schedule holds {entry!r}; {example}"]
        second, prompt = entry
        if not is_number(second) or not second > before:
            return [f"prompt_schedule has the second {second!r} after {before:g}; {example}"]
        if not isinstance(prompt, str) or not prompt.strip():
            return [f"prompt_schedule has the prompt {prompt!r} at {second:g} s; {example}"]
        before = float(second)
    return []


def whole_video_problems(request: Request) -> list[str]:
    """Fields of block-by-block models, asked of a checkpoint that makes the video whole."""
    names = given_fields(request)
    if not names:
        return []
    said = ", ".join(f"{name} is {getattr(request, name)!r}" for name in names)
    instead = "; its length is num_frames" if {"seconds", "endless"} & set(names) else ""
    return [
        f"{said}, but this checkpoint makes a video as a whole and not block by block{instead}: leave it out, or use "
        "a causal checkpoint (variant 'causvid' or 'self_forcing')"
    ]


def conflict_problems(request: Request, model: Model, causal: CausalSchedule, allow_mismatch: bool) -> list[str]:
    """Fields of `request`, as it was given, that exclude each other or contradict what the model was trained for."""
    problems = []
    if model.task == "i2v":
        problems.append(
            "the checkpoint is image-to-video and causal, which this pipeline does not sample; use a causal "
            "text-to-video checkpoint, which goes on from image as its first frame"
        )
    if request.pin_first_frame:
        problems.append("pin_first_frame is set, but a causal model starts from the encoded image anyway; leave it out")
    if request.is_guided and allow_mismatch:  # without it, the schedule's check has said so
        problems.append(
            f"guidance_scale is {request.guidance_scale:g}, but block-by-block sampling has no guidance; leave it out"
        )
    if request.image is not None and request.continue_from is not None:
        problems.append("image and continue_from are both given; a video starts from one of them, leave the other out")
    lengths = [name for name in ("num_frames", "seconds", "endless", "num_fragments") if getattr(request, name)]
    # A request that was resolved before has num_frames in place of the others; only num_fragments can agree with it.
    if len(lengths) > 1 and lengths != ["num_frames", "num_fragments"]:
        said = " and ".join(f"{name} is {getattr(request, name)!r}" for name in lengths)
        problems.append(f"{said}; the length is said once, leave {' and '.join(lengths[1:])} out")
    if request.endless and request.initial_noise is not None:
        problems.append("initial_noise holds noise for some blocks and endless asks for more; give num_frames instead")
    if request.prompt_schedule and request.text_embeddings is not None:
        problems.append("prompt_schedule needs the text encoder, which text_embeddings replaces; leave one out")
    anyway = "leave it out, or set allow_mismatch to true to run it anyway"
    if not allow_mismatch and request.num_frame_per_block not in (None, causal.block):
        problems.append(
            f"num_frame_per_block is {request.num_frame_per_block}, but this checkpoint was trained with blocks of "
            f"{causal.block} latent frames; {anyway}"
        )
    blocks = (request.num_blocks or 0) * (request.num_frame_per_block or causal.block)
    for name, window in (("rollout_window", request.rollout_window or 0), ("num_blocks", blocks)):
        if not allow_mismatch and window > causal.window:
            problems.append(
                f"{name} is {getattr(request, name)}, a window of {window} latent frames, but this checkpoint was "
                f"trained with {causal.window}; {anyway}"
            )
    return problems


def fill(request: Request, model: Model, causal: CausalSchedule) -> Request:
    """The block-by-block fields without None. `request` has its other fields filled, but num_frames as it was given."""
    block = request.num_frame_per_block or causal.block
    mode: Any = request.rollout_mode or causal.mode
    window = request.rollout_window
    if window is None:
        window = causal.window if request.num_blocks is None else request.num_blocks * block
    sink = request.rollout_sink
    if sink is None:
        sink = causal.sink if mode == "sliding" else 0
    context = request.context_noise
    if context is None:
        context = NO_CONTEXT_PASS if causal.context_timestep is None else causal.context_timestep
    filled = dataclasses.replace(
        request,
        rollout_mode=mode,
        rollout_window=window,
        rollout_sink=sink,
        rollout_positions=request.rollout_positions or causal.positions,
        context_noise=float(context),
        num_frame_per_block=block,
        prompt_schedule=tuple((float(second), prompt) for second, prompt in request.prompt_schedule),
    )
    return dataclasses.replace(filled, num_frames=_num_frames(filled, model, causal))


def settled(request: Request) -> Request:
    """A checked request without the fields that num_frames, rollout_window and the size say already."""
    return dataclasses.replace(request, seconds=None, **dict.fromkeys(_SAID_OTHERWISE))


def _num_frames(request: Request, model: Model, causal: CausalSchedule) -> int | None:
    if request.endless or request.num_frames is not None:
        return request.num_frames
    assert request.fps and request.num_frame_per_block and request.rollout_window  # filled
    stride, block, window = _stride(model), request.num_frame_per_block, request.rollout_window
    alone = 1 if causal.independent_first_frame and request.continue_from is None else 0
    if request.seconds is not None:
        frames = math.ceil(round(request.seconds * request.fps, 6))
        latents = math.ceil(frames / stride) if request.continue_from else math.ceil((frames - 1) / stride) + 1
        latents = alone + max(0 if alone else 1, math.ceil((latents - alone) / block)) * block
    elif request.num_fragments is not None:
        latents = window + (request.num_fragments - 1) * (window - block)
        latents -= block if request.continue_from else 0
    else:
        latents = (model.schedule.num_frames - 1) // stride + 1
        if request.rollout_mode == "full":
            latents = min(latents, window - (block if request.continue_from else 0))
        latents = alone + max(1, (latents - alone) // block) * block
    return pixel_frames(latents, stride, follows=request.continue_from is not None)


def pixel_frames(latent_frames: int, stride: int, *, follows: bool) -> int:
    """Frames that latent frames decode to. follows: others come before them.

    >>> pixel_frames(3, 4, follows=False), pixel_frames(3, 4, follows=True)
    (9, 12)
    """
    return stride * latent_frames if follows or not latent_frames else stride * (latent_frames - 1) + 1


def new_latent_frames(request: Request, model: Model) -> int | None:
    """Latent frames of the video that a resolved request gives; None where it is endless."""
    if request.num_frames is None:
        return None
    stride = _stride(model)
    return request.num_frames // stride if request.continue_from else (request.num_frames - 1) // stride + 1


def rollout_problems(request: Request, model: Model, causal: CausalSchedule) -> list[str]:
    """What is wrong with the filled fields together."""
    assert request.rollout_window and request.rollout_sink is not None and request.num_frame_per_block  # filled
    problems = []
    mode, window, sink, block = (
        request.rollout_mode, request.rollout_window, request.rollout_sink, request.num_frame_per_block
    )  # fmt: skip
    if request.denoising_step_list is None:
        problems.append(
            "denoising_step_list is missing, and a causal checkpoint is sampled with one; give the list that it was "
            "trained for, or leave num_inference_steps out"
        )
    if request.num_blocks is not None and request.num_blocks * block != window:
        problems.append(
            f"num_blocks is {request.num_blocks} of num_frame_per_block {block}, which is {request.num_blocks * block} "
            f"latent frames, but rollout_window (a fragment) is {window}; give num_blocks {max(1, window // block)}, "
            "or leave it out"
        )
    if window < sink + block:
        problems.append(
            f"rollout_window is {window} latent frames; it holds the sink ({sink}) and one block ({block}), so give "
            f"at least {sink + block}"
        )
    if sink and mode != "sliding":
        problems.append(f"rollout_sink is {sink} in rollout_mode {mode!r}, which forgets nothing; give 0 or 'sliding'")
    if mode == "fragments" and causal.independent_first_frame:
        problems.append(
            "rollout_mode is 'fragments', but this checkpoint's first frame is a block of its own, and fragments start "
            "with whole blocks; choose 'sliding' or 'full'"
        )
    elif mode == "fragments" and (window % block or window < 2 * block):
        problems.append(
            f"rollout_window is {window} latent frames, but a fragment has two or more blocks of {block}, the first "
            f"from the fragment before; give {max(2, window // block) * block}"
        )
    if request.continue_from is not None and window < 2 * block:
        problems.append(
            f"rollout_window is {window} latent frames, one block, and so continue_from would not be seen; give at "
            f"least {2 * block}"
        )
    if problems:
        return problems
    return _token_problems(request, model) + _length_problems(request, model, causal)


def _token_problems(request: Request, model: Model) -> list[str]:
    assert request.height and request.width  # filled
    vae = model.config("vae")
    patch = model.config("transformer").patch_size
    rows, columns = (
        n // (vae.spatial_stride * p) for n, p in zip((request.height, request.width), patch[1:], strict=True)
    )
    if request.frame_seq_length in (None, rows * columns):
        return []
    return [
        f"frame_seq_length is {request.frame_seq_length}, but a latent frame of {request.height}x{request.width} has "
        f"{rows} x {columns} = {rows * columns} tokens; give that, or leave it out"
    ]


def _length_problems(request: Request, model: Model, causal: CausalSchedule) -> list[str]:
    assert request.rollout_window and request.num_frame_per_block and request.fps  # filled
    stride, block, window = _stride(model), request.num_frame_per_block, request.rollout_window
    mode, follows, frames = request.rollout_mode, request.continue_from is not None, request.num_frames
    if request.num_fragments not in (None, 1) and mode != "fragments":
        return [
            f"num_fragments is {request.num_fragments} in rollout_mode {mode!r}, which has no fragments; set "
            "rollout_mode to 'fragments', or say the length with seconds or num_frames"
        ]
    if frames is None:
        if mode != "full":
            return []
        return ["endless is True, but rollout_mode 'full' ends with its window; choose 'sliding' or 'fragments'"]
    alone = 1 if causal.independent_first_frame and not follows else 0
    least = pixel_frames(alone or block, stride, follows=follows)
    step = stride * block
    if frames < least or (frames - least) % step:
        rule = f"{step}n+{least % step} frames" if least % step else f"multiples of {step} when it continues a video"
        return [f"num_frames is {frames}; this model makes {rule}: use {_nearest(frames, least, step)}"]
    problems = []
    agreed = dataclasses.replace(request, num_frames=None)
    if request.num_fragments is not None and (wanted := _num_frames(agreed, model, causal)) != frames:
        problems.append(
            f"num_fragments is {request.num_fragments}, which gives {wanted} frames, but num_frames is {frames}; leave "
            "one of them out"
        )
    latents = frames // stride if follows else (frames - 1) // stride + 1
    start = alone or block if request.image is not None else 0
    if latents <= start:
        problems.append(
            f"num_frames is {frames}, which the image fills alone; give at least "
            f"{pixel_frames(start + block, stride, follows=False)}"
        )
    most = {"full": window, "sliding": MAX_FRAMES}.get(str(mode), latents) - (block if follows else 0)
    if mode != "fragments" and latents > most:
        longest = pixel_frames(alone + (most - alone) // block * block, stride, follows=follows)
        fix = "choose rollout_mode 'sliding' or 'fragments'" if mode == "full" else "continue it in a second run"
        problems.append(
            f"num_frames is {frames} ({frames / request.fps:g} s), and rollout_mode {mode!r} makes at most {longest}; "
            f"give that, or {fix}"
        )
    if request.prompt_schedule and request.prompt_schedule[-1][0] * request.fps >= frames:
        second = request.prompt_schedule[-1][0]
        problems.append(
            f"prompt_schedule changes the prompt at {second:g} s, but the video ends after {frames / request.fps:g} s; "
            "take it out, or ask for a longer video"
        )
    return problems


def _nearest(value: int, least: int, step: int) -> str:
    low = least + (value - least) // step * step
    near = [n for n in sorted((low, low + step), key=lambda n: abs(n - value)) if n >= least]
    return " or ".join(str(n) for n in near)


def _stride(model: Model) -> int:
    return model.config("vae").temporal_stride


def rollout_plan(request: Request, causal: CausalSchedule) -> RolloutPlan:
    """The order of work of a resolved request."""
    steps: Sequence[float] | None = request.denoising_step_list
    assert steps is not None and request.shift and request.rollout_mode and request.rollout_positions  # resolved
    assert request.rollout_window and request.rollout_sink is not None and request.num_frame_per_block
    assert request.context_noise is not None
    mode: Any = request.rollout_mode
    positions: Any = request.rollout_positions
    return RolloutPlan(
        sigmas=tuple(float(s) for s in step_sigmas(steps, request.shift, warp=bool(request.warp_denoising_step))),
        block=request.num_frame_per_block,
        mode=mode,
        window=request.rollout_window,
        sink=request.rollout_sink,
        positions=positions,
        context_timestep=None if request.context_noise == NO_CONTEXT_PASS else request.context_noise,
        independent_first_frame=causal.independent_first_frame,
    )
