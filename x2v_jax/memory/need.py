"""The memory of one request, and the settings with which it would be less. No jax import."""

import dataclasses
from collections.abc import Mapping
from typing import Unpack

from x2v_jax import shipped
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.memory import advice, predict
from x2v_jax.memory.advice import Change
from x2v_jax.models.config import Config, VaeConfig
from x2v_jax.request.options import RunOptions

# Latent rows and columns that every Wan2.1 model makes: 480 x 832 pixels.
_SMALL = (60, 104)
_SHORT = 5  # latent frames: 17 frames


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """What a video takes of the device.

    latent_size: frames, height and width.
    guided: whether each step runs the network twice.
    encodes_text: whether the text encoder is needed.
    blocks: of a block-by-block video; None for one that is made as a whole.
    on_cpu, available: see `predict.Workload`.
    """

    checkpoint: NativeCheckpoint
    configs: Mapping[str, Config]
    latent_size: tuple[int, int, int]
    guided: bool
    encodes_text: bool
    blocks: predict.BlockSizes | None
    options: RunOptions
    on_cpu: bool = False
    available: int | None = None

    def plan(self, **changes: Unpack[predict.PlanChanges]) -> predict.MemoryPlan:
        """The prediction, with some fields of `predict.Workload` replaced."""
        options = self.options
        work = predict.Workload(
            self.latent_size,
            self.guided,
            dtype=options.dtype,
            vae_dtype=options.vae_dtype,
            keep_encoders=options.keep_encoders,
            sequential_guidance=options.sequential_guidance,
            vae_decode=options.vae_decode,
            offload=options.offload,
            with_text_encoder=self.encodes_text,
            on_cpu=self.on_cpu,
            available=self.available,
            blocks=self.blocks,
        )
        return predict.plan(self.checkpoint, self.configs, dataclasses.replace(work, **changes))

    def explain(self, limit: int | None) -> str:
        """A sentence about the need and what would fit into `limit` bytes; see `memory.advice.explain`."""
        return advice.explain(self.plan(), limit, self.changes(), self.plan)

    def changes(self) -> list[Change]:
        """What a user could change, the least harmful first."""
        options, blocks = self.options, self.blocks
        found: list[Change] = []
        if options.keep_encoders:
            found.append(Change("set keep_encoders to false", {"keep_encoders": False}))
        if options.vae_decode != "tiled":
            found.append(Change("set vae_decode to 'tiled'", {"vae_decode": "tiled"}))
        if self.guided and not options.sequential_guidance:
            found.append(Change("set sequential_guidance to true", {"sequential_guidance": True}))
        if blocks is not None and not blocks.kv_cache.startswith("int8"):
            found.append(Change("set kv_cache to 'int8'", {"blocks": dataclasses.replace(blocks, kv_cache="int8")}))
        floats = [name for name in self.configs if name != "vae" and not self.checkpoint.quantization(name)]
        if "transformer" in floats:
            words = f"use a checkpoint with 8-bit weights (`{shipped.command('convert wan … --quantize int8')}`)"
            found.append(Change(words, {"quantized": ["transformer"]}))
        if "text_encoder" in floats and self.encodes_text:
            words = "bring the text encoder to 8 bits too (`--quantize-component text_encoder`)"
            found.append(Change(words, {"quantized": floats}))
        if options.offload == "none":
            found.append(Change("set offload to 'blocks'", {"offload": "blocks"}))
        if options.dtype == "float32":
            found.append(Change("set dtype to 'bfloat16'", {"dtype": "bfloat16"}))
        frames, height, width = self.latent_size
        vae = predict.config_of(self.configs, "vae", VaeConfig)
        stride = vae.spatial_stride
        small = (min(height, max(_SMALL)), min(width, min(_SMALL)))
        if width >= height:
            small = (min(height, min(_SMALL)), min(width, max(_SMALL)))
        if small != (height, width):
            words = f"ask for {small[0] * stride} x {small[1] * stride} pixels"
            found.append(Change(words, {"latent_size": (frames, *small)}))
        if blocks is None and frames > _SHORT:
            fewer = max(_SHORT, frames // 2)
            count = (fewer - 1) * vae.temporal_stride + 1
            found.append(Change(f"ask for {count} frames", {"latent_size": (fewer, height, width)}))
        return found


def block_sizes(plan: RolloutPlan, kv_cache: str, encoded_from: str) -> predict.BlockSizes:
    """What the memory of a block-by-block video depends on.

    Args:
        kv_cache: what keys and values are kept in.
        encoded_from: "image", "video" or "": what the VAE encodes first.
    """
    encoded = {"": 0, "image": 1 if plan.independent_first_frame else plan.block, "video": plan.window}[encoded_from]
    # Where positions are relative the sink moves on, from a second copy of its keys.
    originals = plan.sink if plan.positions == "relative" else 0
    return predict.BlockSizes(plan.block, plan.window, kv_cache, encoded, originals)
