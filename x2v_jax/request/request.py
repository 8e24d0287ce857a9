"""What one video is asked for, and of which checkpoint. No jax import. Names follow diffusers' WanPipeline.

A field left at None is decided by the schedule that travels with the checkpoint: see `request.resolve`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypedDict, overload, runtime_checkable

import numpy as np

from x2v_jax.errors import UserError, did_you_mean
from x2v_jax.models.config import Schedule, VaeConfig, WanConfig
from x2v_jax.request.diffusers_names import FIELDS

if TYPE_CHECKING:
    import PIL.Image


@runtime_checkable
class Model(Protocol):
    """What `resolve` asks of a checkpoint; `checkpoint.native.reader.NativeCheckpoint` answers it."""

    @property
    def path(self) -> pathlib.Path: ...
    @property
    def task(self) -> str | None: ...
    @property
    def variant(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...
    @overload
    def config(self, component: Literal["transformer"], /) -> WanConfig: ...
    @overload
    def config(self, component: Literal["vae"], /) -> VaeConfig: ...
    def has(self, component: str, /) -> bool: ...
    def files(self, component: str, /) -> Sequence[pathlib.Path]: ...


type File = str | os.PathLike[str]
type Picture = "File | np.ndarray | PIL.Image.Image"


@dataclasses.dataclass(frozen=True)
class Request:
    """What one video is asked for. None: as the checkpoint says.

    prompt: what the video shows.
    negative_prompt: what it should not show, or "wan" for the text of Wan2.1's own scripts; it counts with guidance
        only.
    image: a path, a PIL image or uint8 [H, W, 3]: the first frame. Image-to-video takes its shape, at height x width
        pixels in all (Wan's rule). Block by block it is scaled to fill height x width, and what sticks out is cut off.
    height, width: in pixels.
    num_frames: 4n+1. Block by block: whole blocks (9, 21, 33, … for blocks of 3), or where it continues a video a
        multiple of 4 blocks.
    fps: frames a second of the file.
    num_inference_steps: of the sampler.
    guidance_scale: velocity = uncond + scale (cond - uncond); 1 turns guidance off.
    shift: moves the noise levels towards noise. None with a denoising_step_list on a base checkpoint, that is with a
        distillation LoRA, means 5: the published LoRAs were trained with it.
    denoising_step_list: timesteps above 0 and at most 1000, falling; given, it selects the step-distill sampler.
    warp_denoising_step: whether `shift` is still to be applied to that list.
    seed: 0 to 2^64 - 1; None draws one.
    size_rule: of image-to-video: "published" takes the picture's shape at the area height x width, rounded down as
        Wan's code does (480x832 with a picture of 832x480 becomes 464x832); "exact" takes height and width, and cuts
        off what of the picture sticks out.
    pin_first_frame: replace the first latent frame by the encoded image after the last step. The published pipelines
        do not: the model keeps the image by itself, up to a slight change of colour.
    initial_noise: float array [C, F, H, W], or a safetensors file with `noise` [C, F, H, W] and optionally `renoise`
        [steps - 1, C, F, H, W]. Block by block a file with `noise` [blocks, frames, C, H, W] and optionally `renoise`
        [blocks, steps - 1, frames, C, H, W].
    text_embeddings: safetensors file with `text` [L, D] and, for guidance, `negative_text`; replaces the text encoder.
    save_latents: file to write `latents` [C, F, H, W] to, as they are before the VAE; of an endless video the last.

    The rest is for checkpoints that make a video block by block (`Schedule.causal`).

    rollout_mode: past rollout_window, "full" ends, "sliding" forgets the oldest frames, "fragments" starts again from
        the last block; see `rollout_plan.RolloutPlan`.
    rollout_window: latent frames that the network sees at most.
    rollout_sink: of these the first ones of the video, which are never forgotten ("sliding" only).
    rollout_positions: "relative" or "absolute" positions of the sink.
    context_noise: timestep at which later blocks see a finished one, 0 to 1000; -1: as its last step left it.
    seconds: the length instead of num_frames, rounded up to whole blocks.
    endless: until the caller stops.
    continue_from: file of an earlier `save_latents`, or an mp4 of this size. It is not part of the new video.
    prompt_schedule: (second, prompt) pairs: the prompt of the first block that starts then or later, and on. What
        the network sees of the video is encoded again under it (LongLive, arXiv:2509.22622).
    kv_cache: what keys and values are kept in: "bfloat16", "float32", "int8" or "int8_e4m3" (int8 keys, float8 values);
        None: as the network computes.
    num_fragments: LightX2V's name for the number of windows of a "fragments" video.
    num_frame_per_block: latent frames of a block; checked against the checkpoint.
    num_blocks: LightX2V's name for the blocks of a window; checked against rollout_window.
    frame_seq_length: LightX2V's name for the tokens of a latent frame; checked against the size.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    image: Picture | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    denoising_step_list: Sequence[float] | None = None
    warp_denoising_step: bool | None = None
    seed: int | None = None
    size_rule: str = "published"
    pin_first_frame: bool = False
    initial_noise: File | np.ndarray | None = None
    text_embeddings: File | None = None
    save_latents: File | None = None
    rollout_mode: str | None = None
    rollout_window: int | None = None
    rollout_sink: int | None = None
    rollout_positions: str | None = None
    context_noise: float | None = None
    seconds: float | None = None
    endless: bool = False
    continue_from: File | None = None
    prompt_schedule: Sequence[tuple[float, str]] = ()
    kv_cache: str | None = None
    num_fragments: int | None = None
    num_frame_per_block: int | None = None
    num_blocks: int | None = None
    frame_seq_length: int | None = None

    @property
    def uses_guidance(self) -> bool:
        """Whether each step runs the network for the negative prompt too (classifier-free guidance)."""
        return self.guidance_scale is not None and self.guidance_scale != 1.0

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def of(cls, prompt: str, fields: "Mapping[str, object] | RequestFields") -> Self:
        """A request from a prompt and fields by name.

        Raises:
            UserError: an unknown field, with the nearest known one.
        """
        for name in fields:
            if name not in cls.field_names():
                known = cls.field_names()
                advice = FIELDS.get(name) or did_you_mean(name, known, f"known are {', '.join(known)}")
                raise UserError(f"unknown field {name!r}; {advice}")
        return cls(prompt, **fields)  # type: ignore[arg-type]  # the types of values are checked when it is resolved


class RequestFields(TypedDict, total=False):
    """The fields of `Request` but the prompt, as keywords: what an editor offers for `pipe("a cat", …)`."""

    negative_prompt: str | None
    image: Picture | None
    height: int | None
    width: int | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    shift: float | None
    denoising_step_list: Sequence[float] | None
    warp_denoising_step: bool | None
    seed: int | None
    size_rule: str
    pin_first_frame: bool
    initial_noise: File | np.ndarray | None
    text_embeddings: File | None
    save_latents: File | None
    rollout_mode: str | None
    rollout_window: int | None
    rollout_sink: int | None
    rollout_positions: str | None
    context_noise: float | None
    seconds: float | None
    endless: bool
    continue_from: File | None
    prompt_schedule: Sequence[tuple[float, str]]
    kv_cache: str | None
    num_fragments: int | None
    num_frame_per_block: int | None
    num_blocks: int | None
    frame_seq_length: int | None
