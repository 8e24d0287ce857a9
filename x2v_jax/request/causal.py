"""Block-by-block settings of a request: decided from the checkpoint's CausalSchedule, and checked. No jax import.

Requests count pixel frames, the network latent frames. A video from nothing has 4n+1 pixel frames for n+1 latent ones;
the frames that a continuation adds are 4 for each latent frame.
"""

import dataclasses
import math

from x2v_jax.diffusion.rollout_plan import Mode, Positions, RolloutPlan
from x2v_jax.models.causal import MAX_FRAMES
from x2v_jax.models.config import CausalSchedule
from x2v_jax.request.request import Model, Request

# How `Request.context_noise` says that there is no clean pass.
NO_CONTEXT_PASS = -1.0
# LightX2V's names for what mode, window and size say too: checked, then said in our own terms.
_SAID_OTHERWISE = ("num_fragments", "num_blocks", "frame_seq_length")


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """How a video is made block by block; every field is decided.

    num_frames: pixel frames of the video; 0 where it is endless.
    stride: pixel frames a latent frame.
    follows: whether it continues an earlier video.
    alone: latent frames (1 or 0) of a first block that is the first frame alone.
    The rest as in `RolloutPlan`; context_noise as in `Request`.
    """

    mode: Mode
    window: int
    sink: int
    positions: Positions
    context_noise: float
    block: int
    fps: int
    stride: int
    follows: bool
    alone: int
    num_frames: int = 0

    @property
    def latent_frames(self) -> int:
        """Of the video; 0 where it is endless."""
        return latent_frames(self.num_frames, self.stride, follows=self.follows)

    def plan(
        self, sigmas: tuple[float, ...], timesteps: tuple[float, ...] | None, causal: CausalSchedule
    ) -> RolloutPlan:
        """The order of work. timesteps: what the network is asked at, where that is not 1000 * sigma."""
        return RolloutPlan(
            sigmas=sigmas,
            block=self.block,
            mode=self.mode,
            window=self.window,
            sink=self.sink,
            positions=self.positions,
            context_timestep=None if self.context_noise == NO_CONTEXT_PASS else self.context_noise,
            independent_first_frame=causal.independent_first_frame,
            timesteps=timesteps,
        )

    def written_into(self, request: Request) -> Request:
        """The request with these settings, and without what they say in other words."""
        said = dict.fromkeys(_SAID_OTHERWISE)
        return dataclasses.replace(
            request,
            num_frames=self.num_frames or None,
            rollout_mode=self.mode,
            rollout_window=self.window,
            rollout_sink=self.sink,
            rollout_positions=self.positions,
            context_noise=self.context_noise,
            num_frame_per_block=self.block,
            prompt_schedule=tuple((float(second), prompt) for second, prompt in request.prompt_schedule),
            seconds=None,
            **said,
        )


def decide(request: Request, fps: int, model: Model, causal: CausalSchedule) -> BlockSettings:
    """The settings that a request with good types asks for, or that the checkpoint was trained with."""
    block = request.num_frame_per_block or causal.block
    mode: Mode = request.rollout_mode or causal.mode  # type: ignore[assignment]  # one of them, or checks would have said
    window = request.rollout_window
    if window is None:
        window = causal.window if request.num_blocks is None else request.num_blocks * block
    sink = request.rollout_sink
    if sink is None:
        sink = causal.sink if mode == "sliding" else 0
    context = request.context_noise
    if context is None:
        context = NO_CONTEXT_PASS if causal.context_timestep is None else causal.context_timestep
    settings = BlockSettings(
        mode=mode,
        window=window,
        sink=sink,
        positions=request.rollout_positions or causal.positions,  # type: ignore[arg-type]
        context_noise=float(context),
        block=block,
        fps=fps,
        stride=model.config("vae").temporal_stride,
        follows=request.continue_from is not None,
        alone=1 if causal.independent_first_frame and request.continue_from is None else 0,
    )
    return dataclasses.replace(settings, num_frames=_num_frames(request, settings, model))


def _num_frames(request: Request, settings: BlockSettings, model: Model) -> int:
    if request.endless:
        return 0
    return request.num_frames or _frames_said_otherwise(request, settings, model)


def _frames_said_otherwise(request: Request, settings: BlockSettings, model: Model) -> int:
    stride, block, window, alone = settings.stride, settings.block, settings.window, settings.alone
    if request.seconds is not None:
        frames = math.ceil(round(request.seconds * settings.fps, 6))
        latents = math.ceil(frames / stride) if settings.follows else math.ceil((frames - 1) / stride) + 1
        latents = alone + max(0 if alone else 1, math.ceil((latents - alone) / block)) * block
    elif request.num_fragments is not None:
        latents = window + (request.num_fragments - 1) * (window - block)
        latents -= block if settings.follows else 0
    else:
        latents = (model.schedule.num_frames - 1) // stride + 1
        if settings.mode == "full":
            latents = min(latents, window - (block if settings.follows else 0))
        latents = alone + max(1, (latents - alone) // block) * block
    return pixel_frames(latents, stride, follows=settings.follows)


def pixel_frames(latent_frames: int, stride: int, *, follows: bool) -> int:
    """Frames that latent frames decode to. follows: others come before them.

    >>> pixel_frames(3, 4, follows=False), pixel_frames(3, 4, follows=True)
    (9, 12)
    """
    return stride * latent_frames if follows or not latent_frames else stride * (latent_frames - 1) + 1


def latent_frames(pixel_frames: int, stride: int, *, follows: bool) -> int:
    """The other way round.

    >>> latent_frames(9, 4, follows=False), latent_frames(12, 4, follows=True), latent_frames(0, 4, follows=False)
    (3, 3, 0)
    """
    return pixel_frames // stride if follows or not pixel_frames else (pixel_frames - 1) // stride + 1


def conflict_problems(request: Request, model: Model, causal: CausalSchedule, allow_mismatch: bool) -> list[str]:
    """Fields of `request`, as it was given, that exclude each other or contradict what the model was trained for."""
    problems: list[str] = []
    if model.task == "i2v":
        problems.append(
            "the checkpoint is image-to-video and causal, which this pipeline does not sample; use a causal "
            "text-to-video checkpoint, which goes on from image as its first frame"
        )
    if request.pin_first_frame:
        problems.append("pin_first_frame is set, but a causal model starts from the encoded image anyway; leave it out")
    if request.uses_guidance and allow_mismatch:  # without it, the schedule's check has said so
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


def rollout_problems(
    request: Request,
    settings: BlockSettings,
    size: tuple[int, int],
    has_steps: bool,
    model: Model,
    causal: CausalSchedule,
) -> list[str]:
    """What is wrong with the settings together.

    Args:
        size: height and width in pixels.
        has_steps: whether there is a denoising_step_list, the request's or the checkpoint's.
    """
    problems: list[str] = []
    mode, window, sink, block = settings.mode, settings.window, settings.sink, settings.block
    if not has_steps:
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
    return _token_problems(request, size, model) + _length_problems(request, settings, model)


def _token_problems(request: Request, size: tuple[int, int], model: Model) -> list[str]:
    stride, patch = model.config("vae").spatial_stride, model.config("transformer").patch_size
    rows, columns = (n // (stride * p) for n, p in zip(size, patch[1:], strict=True))
    if request.frame_seq_length in (None, rows * columns):
        return []
    return [
        f"frame_seq_length is {request.frame_seq_length}, but a latent frame of {size[0]}x{size[1]} has "
        f"{rows} x {columns} = {rows * columns} tokens; give that, or leave it out"
    ]


def _length_problems(request: Request, settings: BlockSettings, model: Model) -> list[str]:
    stride, block, window, alone = settings.stride, settings.block, settings.window, settings.alone
    mode, follows, frames = settings.mode, settings.follows, settings.num_frames
    if request.num_fragments not in (None, 1) and mode != "fragments":
        return [
            f"num_fragments is {request.num_fragments} in rollout_mode {mode!r}, which has no fragments; set "
            "rollout_mode to 'fragments', or say the length with seconds or num_frames"
        ]
    if not frames:
        if mode != "full":
            return []
        return ["endless is True, but rollout_mode 'full' ends with its window; choose 'sliding' or 'fragments'"]
    least = pixel_frames(alone or block, stride, follows=follows)
    step = stride * block
    if frames < least or (frames - least) % step:
        rule = f"{step}n+{least % step} frames" if least % step else f"multiples of {step} when it continues a video"
        return [f"num_frames is {frames}; this model makes {rule}: use {_nearest(frames, least, step)}"]
    problems: list[str] = []
    if request.num_fragments is not None:
        wanted = _frames_said_otherwise(dataclasses.replace(request, seconds=None), settings, model)
        if wanted != frames:
            problems.append(
                f"num_fragments is {request.num_fragments}, which gives {wanted} frames, but num_frames is {frames}; "
                "leave one of them out"
            )
    latents = settings.latent_frames
    start = alone or block if request.image is not None else 0
    if latents <= start:
        problems.append(
            f"num_frames is {frames}, which the image fills alone; give at least "
            f"{pixel_frames(start + block, stride, follows=False)}"
        )
    most = {"full": window, "sliding": MAX_FRAMES}.get(mode, latents) - (block if follows else 0)
    if mode != "fragments" and latents > most:
        longest = pixel_frames(alone + (most - alone) // block * block, stride, follows=follows)
        fix = "choose rollout_mode 'sliding' or 'fragments'" if mode == "full" else "continue it in a second run"
        problems.append(
            f"num_frames is {frames} ({frames / settings.fps:g} s), and rollout_mode {mode!r} makes at most {longest}; "
            f"give that, or {fix}"
        )
    if request.prompt_schedule and request.prompt_schedule[-1][0] * settings.fps >= frames:
        second = request.prompt_schedule[-1][0]
        problems.append(
            f"prompt_schedule changes the prompt at {second:g} s, but the video ends after "
            f"{frames / settings.fps:g} s; take it out, or ask for a longer video"
        )
    return problems


def _nearest(value: int, least: int, step: int) -> str:
    low = least + (value - least) // step * step
    near = [n for n in sorted((low, low + step), key=lambda n: abs(n - value)) if n >= least]
    return " or ".join(str(n) for n in near)
