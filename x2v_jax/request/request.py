"""What one video is asked for, completed from the checkpoint and checked before anything is loaded. No jax import.

Names follow diffusers' WanPipeline. A field left at None is filled by `resolve` from the schedule that travels with the
checkpoint, and a request that contradicts that schedule is refused: a distilled model with guidance or with other
steps gives blurred or burnt video without any error.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self

from x2v_jax.errors import UserError, did_you_mean


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
                known = cls.field_names()
                raise UserError(f"unknown field {name!r}; {did_you_mean(name, known, f'known are {", ".join(known)}')}")
        return cls(prompt=prompt, **fields)
