"""The memory of one request, what to say where it does not suffice, and the settings with which it would be less.

Weights are counted exactly and activations are not, so a video is refused beforehand only where its weights alone are
more than the device has, or where the user set a limit; a prediction beyond what is free is a warning, because it can
be wrong in either direction and a run that would have gone well is worth more than an error that comes early. No jax
import.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Protocol, Unpack, cast, runtime_checkable

from x2v_jax import shipped
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.memory import predict
from x2v_jax.memory.predict import MemoryPlan, PlanChanges
from x2v_jax.models.config import Config, VaeConfig
from x2v_jax.request.options import RunOptions


@runtime_checkable
class PlanWith(Protocol):
    """Predicted memory of a video with some fields of `predict.Workload` changed."""

    def __call__(self, **changes: Unpack[PlanChanges]) -> MemoryPlan: ...


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that a user could change. values: fields of `predict.Workload` after it."""

    words: str
    values: PlanChanges


def explain(plan: MemoryPlan, limit: int | None, changes: list[Change], plan_with: PlanWith) -> str:
    """A sentence: what is needed, of what it consists, what would fit.

    Args:
        limit: bytes there are; None: not known, and then less than the plan's peak.
        changes: what there is to try, the least harmful first.
    """
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    parts = sorted(plan.parts[phase].items(), key=lambda part: -part[1])[:3]
    biggest = ", ".join(f"{_words(name, plan)} {_gb(size)}" for name, size in parts if size)
    need = f"{_gb(plan.peak)} GB predicted in the phase {phase!r} (the biggest parts, in GB: {biggest})"
    found = settings_that_fit(plan, limit, changes, plan_with)
    if not found:
        return f"{need}; no settings help enough here: ask for a smaller height, width or num_frames"
    return f"{need}; {found}"


def settings_that_fit(plan: MemoryPlan, limit: int | None, changes: list[Change], plan_with: PlanWith) -> str:
    """What to change, with the need that is left: single changes that suffice, or as many as it takes; or nothing."""
    limit = plan.peak - 1 if limit is None else limit
    alone = [(change, plan_with(**change.values).peak) for change in changes]
    if enough := [f"{change.words} ({_gb(peak)} GB)" for change, peak in alone if peak <= limit]:
        return " or ".join(enough[:3])
    together: PlanChanges = {}
    words: list[str] = []
    peak = plan.peak
    for change, _ in alone:
        less = plan_with(**(together | change.values)).peak
        if less < peak:
            together, peak = together | change.values, less
            words.append(change.words)
        if peak <= limit:
            return f"{' and '.join(words)} ({_gb(peak)} GB)"
    return ""


def check(plan: MemoryPlan, free: int | None, device: int | None, limit: int | None, say: Callable[[int], str]) -> None:
    """Compares a prediction with what there is, before anything is loaded.

    Args:
        free, device: bytes that the device could still give, and that it has; None: not known.
        limit: bytes that the user allows.
        say: bytes there are -> `explain`'s sentence.

    Raises:
        UserError: it is beyond the user's limit, or its weights alone are more than the device has.
    """
    if limit is not None and plan.peak > limit:
        raise UserError(f"memory_limit is {_gb(limit)} GB, and this video needs more: {say(limit)}")
    if device is not None and plan.weights_at_once > device:
        raise UserError(
            f"the device has {_gb(device)} GB of memory, and the weights that are needed at one time take "
            f"{_gb(plan.weights_at_once)} GB: {say(device)}"
        )
    if free is not None and plan.peak > free:
        warnings.warn(
            f"the device has {_gb(free)} GB of memory free, which may not be enough: {say(free)}", stacklevel=3
        )


@contextlib.contextmanager
def explained(say: Callable[[], str]) -> Generator[None]:
    """Turns jax's error on full memory into a UserError that says what to change."""
    import jax

    # jaxlib, where the error comes from, has no types.
    failure = cast(type[Exception], jax.errors.JaxRuntimeError)  # pyright: ignore[reportUnknownMemberType]
    try:
        yield
    except failure as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device's memory does not suffice: {say()}") from error


def _words(part: str, plan: MemoryPlan) -> str:
    return f"weights of the {part.replace('_', ' ')}" if part in plan.weights else part


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.2g}"


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
        """A sentence about the need and what would fit into `limit` bytes; see `explain`."""
        return explain(self.plan(), limit, self.changes(), self.plan)

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
