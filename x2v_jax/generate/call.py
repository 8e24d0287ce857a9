"""A call of a pipeline: what it is made with, what watches it, and in which form its videos come."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from x2v_jax.checkpoint.lora.arguments import Loras, lora_pairs
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.denoise import OnStep
from x2v_jax.generate.progress import Progress
from x2v_jax.request.calls import Call, CallOptions, StepEndCallback
from x2v_jax.request.options import OptionFields, RunOptions


@dataclasses.dataclass(frozen=True)
class StartOptions:
    """What a `Pipeline` takes beside `RunOptions`.

    loras: merged into the transformer when it is loaded: a file, a (file, strength) pair, a list of either, or a dict
        of file -> strength.
    lora: another name for `loras`.
    progress: whether each video shows on stderr how far it is and how long it still takes.
    compilation_cache: folder in which compiled programs are kept for the next process. None: ~/.cache/x2v_jax, unless
        jax has a folder already, by its own setting or its environment variable; "": nothing is set.
    """

    # Of the types of `PipelineFields`; what else is given is told in a sentence.
    loras: object = None
    lora: object = None
    progress: object = False
    compilation_cache: object = None

    def lora_pairs(self) -> tuple[tuple[str, float], ...]:
        """
        Raises:
            UserError: what is given is no form of LoRAs, or is given twice.
        """
        if self.loras is not None and self.lora is not None:
            raise UserError("loras and lora are both given, and mean the same; leave one out")
        return lora_pairs(self.lora, "lora") if self.loras is None else lora_pairs(self.loras)

    def cache(self) -> str | None:
        """
        Raises:
            UserError: the compilation cache is no folder's name.
        """
        folder = self.compilation_cache
        if folder is not None and not isinstance(folder, str | pathlib.Path):
            raise UserError(f"compilation_cache is {folder!r}; give a folder, or '' for none")
        return None if folder is None else str(folder)


class PipelineFields(OptionFields, total=False):
    """`StartOptions` and `RunOptions` as keywords."""

    loras: Loras | None
    lora: Loras | None
    progress: bool
    compilation_cache: str | None


def split(values: Mapping[str, object]) -> tuple[StartOptions, dict[str, object]]:
    """The options of `StartOptions` among those of a pipeline, and the others."""
    own = {field.name for field in dataclasses.fields(StartOptions)}
    start = StartOptions(**{name: value for name, value in values.items() if name in own})
    return start, {name: value for name, value in values.items() if name not in own}


def describe(checkpoint: NativeCheckpoint, options: RunOptions, loras: Sequence[tuple[str, float]]) -> str:
    """What `repr` says of a pipeline: the checkpoint, its videos by default, and what is not as usual."""
    schedule = checkpoint.schedule
    if schedule.denoising_step_list is not None:
        steps = f"{len(schedule.denoising_step_list)} steps"
    else:
        steps = f"{schedule.num_inference_steps} steps with guidance {schedule.guidance_scale:g}"
    size = f"{schedule.num_frames} frames of {schedule.height}x{schedule.width}"
    how = "" if schedule.causal is None else " block by block"
    said = [f"{checkpoint.path}: {checkpoint.task} {checkpoint.variant}, {steps}{how}, {size}, {options.dtype}"]
    said += [f"lora {path} at {strength:g}" for path, strength in loras]
    for field in dataclasses.fields(options):
        if field.name != "dtype" and (value := getattr(options, field.name)) != field.default:
            said.append(f"{field.name}={value!r}")
    return f"Pipeline({', '.join(said)})"


def with_display(on_step: OnStep | None, display: Progress | None) -> OnStep | None:
    """on_step, and the display's own."""
    if display is None:
        return on_step
    shown = display

    def both(step: int, count: int, latents: Array) -> None:
        shown.step(step + 1)
        if on_step is not None:
            on_step(step, count, latents)

    return both


def watcher(pipeline: object, sigmas: Sequence[float], options: CallOptions) -> OnStep | None:
    """The on_step of a call: its own, and diffusers' callback_on_step_end; None without either."""
    on_step, callback = cast(OnStep | None, options.on_step), options.callback_on_step_end
    if callback is None:
        return on_step

    def both(step: int, count: int, latents: Array) -> None:
        if on_step is not None:
            on_step(step, count, latents)
        given = jnp.moveaxis(latents, -1, 1)
        kept = cast(StepEndCallback, callback)(
            pipeline, step, 1000 * sigmas[min(step, len(sigmas) - 1)], {"latents": given}
        )
        if isinstance(kept, Mapping) and kept.get("latents", given) is not given:
            raise UserError(
                "callback_on_step_end gave other latents back, and here a callback only looks; return them as they are"
            )

    return both


def output(videos: Sequence[np.ndarray], call: Call) -> object:
    """The videos in the form that a call asks for."""
    if call.options.output_type == "pil":
        from PIL import Image

        lists = [[Image.fromarray(frame) for frame in video] for video in videos]
        return lists if call.is_batch else lists[0]
    if not call.is_batch:
        return videos[0]
    if len({video.shape for video in videos}) > 1:
        raise UserError("the videos are of several sizes, which are no one array; give output_type='pil'")
    return np.stack(videos)
