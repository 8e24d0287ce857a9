"""Decides all that a conversion will do, and refuses what cannot be done, from names and headers alone."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from x2v_jax.checkpoint.account import differences
from x2v_jax.checkpoint.file_sets import read_json
from x2v_jax.checkpoint.layouts import Layout, Source, declared, recognise
from x2v_jax.checkpoint.lora import LoraFile, merge_into
from x2v_jax.checkpoint.names import COMPONENTS
from x2v_jax.checkpoint.native_writer import Streamed
from x2v_jax.checkpoint.schedules import SCHEDULES, default_schedule, override_schedule, resolution_in
from x2v_jax.checkpoint.selection import select
from x2v_jax.checkpoint.sizes import infer_config
from x2v_jax.checkpoint.sources import OfficialTensors, to_official
from x2v_jax.checkpoint.store import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.streaming import Findings, stream
from x2v_jax.checkpoint.tensors import LazyTensor
from x2v_jax.errors import UserError
from x2v_jax.models.config import ClipConfig, Schedule, WanConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What a conversion is to do.

    Attributes:
        variant: base, distill, causvid or self_forcing; None for the only one there.
        components: which networks; empty for all there are.
        dtype: "keep", float32, bfloat16 or float16.
        loras: (file, strength), merged into the transformer.
        allow_partial: merge what fits of a LoRA.
        schedule: a published name, JSON, or a JSON file that replaces fields of the variant's schedule.
        reuse: a native checkpoint that lends its encoders, VAE and tokenizer.
        overwrite: replace a native checkpoint at the destination.
        allow_nonfinite: keep NaN and infinity.
        settings: component -> sizes that neither tensors nor config.json tell.
        command: recorded in the provenance.
    """

    variant: str | None = None
    components: tuple[str, ...] = ()
    dtype: str = "keep"
    loras: tuple[tuple[str, float], ...] = ()
    allow_partial: bool = False
    schedule: str | None = None
    reuse: str | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    command: str | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """One network: where it comes from, its sizes, its tensors under official names."""

    source: Source
    config: Any
    found: OfficialTensors


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a conversion will do. notes: sentences for the user. findings: filled while the streams are read."""

    layout: Layout
    opened: Mapping[str, Opened]
    streams: Mapping[str, Mapping[str, Streamed]]
    references: Mapping[str, str]
    tokenizer: pathlib.Path | None
    task: str | None
    variant: str
    schedule: Schedule
    notes: tuple[str, ...]
    findings: Findings

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for streams in self.streams.values() for s in streams.values())

    @property
    def source_files(self) -> list[pathlib.Path]:
        """Every file that the result depends on, LoRAs aside."""
        files = [f for o in self.opened.values() for f in (*o.source.files, o.source.config_file) if f]
        return list(dict.fromkeys([*files, *([self.tokenizer] if self.tokenizer else [])]))


def make_plan(source: str | os.PathLike[str], options: Options, destination: str | os.PathLike[str] = ".") -> Plan:
    """Opens and checks everything that a conversion needs.

    Raises:
        UserError: as `convert.convert`.
    """
    layout = recognise(pathlib.Path(source))
    if layout.kind == "native":
        raise UserError(f"{source} is converted already; run it with `python -m infer --config.checkpoint={source}`")
    notes: list[str] = []
    reuse = open_checkpoint(options.reuse) if options.reuse else None
    lent = _lent(reuse, options.components)
    opened = _open_all(layout, options, lent, notes)
    transformer = opened["transformer"].config if "transformer" in opened else None
    if transformer and transformer.model_type == "t2v":
        lent = [name for name in lent if name != "image_encoder"]
        if not options.components and opened.pop("image_encoder", None):
            notes.append("image_encoder left out: a text-to-video model does not use it")
    _check_fit(opened, reuse, lent)
    tensors = {name: one.found.tensors for name, one in opened.items()}
    if options.loras:
        tensors["transformer"] = _merge_loras(tensors.get("transformer"), options, notes)
    findings = Findings()
    streams: dict[str, dict[str, Streamed]] = {}
    for name, one in opened.items():
        streams[name], mixed = stream(name, one.config, one.found, tensors[name], options.dtype, findings)
        if mixed:
            notes.append(f"{name}: {mixed} parameters have layers of several types; they are stored as the widest")
    variant, schedule = _variant_and_schedule(opened.get("transformer"), options, reuse, notes)
    tokenizer = None if "tokenizer" in lent or options.components else layout.tokenizer
    if tokenizer is not None:
        read_json(tokenizer)  # refuses what a clone without Git LFS or a broken download left there
    notes += _missing({*opened, *lent, *(["tokenizer"] if tokenizer else [])}, transformer)
    return Plan(
        layout=layout,
        opened=opened,
        streams=streams,
        references=_references(reuse, lent, pathlib.Path(destination)),
        tokenizer=tokenizer,
        task=transformer.model_type if transformer else None,
        variant=variant,
        schedule=schedule,
        notes=tuple(notes),
        findings=findings,
    )


def open_source(source: Source, settings: Mapping[str, Any] | None = None) -> tuple[Opened, list[str]]:
    """Reads the headers of a source, finds its sizes, and lists what is wrong with its tensors.

    Raises:
        UserError: its sizes cannot be told.
    """
    found = to_official(source.read(), source.kind)
    config = infer_config(source.component, found.shapes, declared(source) | dict(settings or {}))
    if isinstance(config, ClipConfig) and source.naming == "diffusers" and "visual.head" not in found.tensors:
        found = _with_empty_head(found, config)
    return Opened(source, config, found), differences(source.component, config, found)


def _with_empty_head(found: OfficialTensors, config: ClipConfig) -> OfficialTensors:
    """CLIPVisionModel is published without the projection, which Wan2.1 does not use; the parameter tree has it."""
    shape = (config.dim, config.out_dim)
    dtype = next(iter(found.tensors.values())).dtype
    head = LazyTensor(shape, dtype, lambda: np.zeros(shape, dtype))
    return dataclasses.replace(found, tensors={**found.tensors, "visual.head": head})


def _open_all(layout: Layout, options: Options, lent: Sequence[str], notes: list[str]) -> dict[str, Opened]:
    """Opens every network; what is wrong is said of all of them at once."""
    problems: list[str] = []
    opened: dict[str, Opened] = {}
    for component, source in select(layout, options.variant, options.components, lent).items():
        one, wrong = open_source(source, options.settings.get(component))
        if wrong:
            problems.append(f"{source.location} ({component}): {'. '.join(wrong)}")
        else:
            opened[component] = one
            notes += _source_notes(one)
    if problems:
        fix = "The files are incomplete or of another model: download them again or give others"
        raise UserError(f"{'; '.join(problems)}. {fix}")
    return opened


def _source_notes(one: Opened) -> Iterator[str]:
    source, found = one.source, one.found
    if source.state:
        left = f" (left aside: {', '.join(source.other_states)})" if source.other_states else ""
        yield f"{source.component}: taken from {source.state!r} of {source.files[0].name}{left}"
    if found.quantized:
        yield (
            f"{source.component}: {len(found.quantized)} 8-bit weights of {source.location} are multiplied out with "
            "their scales; what 8 bits lost stays lost, so prefer the 16-bit files where you have them"
        )
    for reason in dict.fromkeys(found.ignored.values()):
        count = sum(r == reason for r in found.ignored.values())
        yield f"{source.component}: {count} {'tensor' if count == 1 else 'tensors'} ignored ({reason})"
    if "visual.head" in found.tensors and "visual.head" not in found.origin:
        yield "image_encoder: the files have no projection, which Wan2.1 does not use; zeros stand for it"


def _lent(reuse: NativeCheckpoint | None, asked: Sequence[str]) -> list[str]:
    return [c for c in (*COMPONENTS[1:], "tokenizer") if reuse and reuse.has(c) and c not in asked]


def _references(reuse: NativeCheckpoint | None, lent: Sequence[str], destination: pathlib.Path) -> dict[str, str]:
    references: dict[str, str] = {}
    if reuse is None:
        return references
    for component in lent:
        holder = pathlib.Path(os.path.abspath(reuse.holder(component).path))
        # Side by side, the two can be moved together; anywhere else only the absolute path is sure.
        near = holder.parent == pathlib.Path(os.path.abspath(destination)).parent
        references[component] = f"../{holder.name}" if near else str(holder)
    return references


def _check_fit(opened: Mapping[str, Opened], reuse: NativeCheckpoint | None, lent: Sequence[str]) -> None:
    """The networks of one checkpoint must fit each other."""
    configs: dict[str, Any] = {name: one.config for name, one in opened.items()}
    if reuse is not None:
        configs |= {name: reuse.config(name) for name in lent if name != "tokenizer"}
    transformer = configs.get("transformer")
    if transformer is None:
        return
    pairs = [("text_encoder", "dim", "text_dim"), ("vae", "z_dim", "out_dim")]
    if transformer.model_type == "i2v":
        pairs.append(("image_encoder", "dim", "clip_dim"))
    for component, field, needed in pairs:
        size, wanted = getattr(configs.get(component), field, None), getattr(transformer, needed)
        if size not in (None, wanted):
            raise UserError(
                f"{component}: {field} is {size}, and the transformer's {needed} is {wanted}; give the {component} "
                "that belongs to this transformer"
            )


def _merge_loras(tensors: Mapping[str, LazyTensor] | None, options: Options, notes: list[str]) -> dict[str, LazyTensor]:
    if tensors is None:
        raise UserError("--lora: no transformer is converted; add --component transformer or leave --lora out")
    files = [(LoraFile.open(path), strength) for path, strength in options.loras]
    merged, report = merge_into(tensors, files, options.allow_partial)
    notes.append(str(report))
    distills = any("distill" in pathlib.Path(path).name.lower() for path, strength in options.loras if strength)
    if options.schedule is None and distills:
        notes.append(
            "the LoRA's name says that it distills, and the schedule is still the base model's; give --schedule "
            "distill to make its few steps without guidance the checkpoint's own"
        )
    return merged


def _variant_and_schedule(
    transformer: Opened | None, options: Options, reuse: NativeCheckpoint | None, notes: list[str]
) -> tuple[str, Schedule]:
    if transformer is None:
        default = reuse.schedule if reuse else default_schedule("base", None)
        return "base", override_schedule(options.schedule, default) if options.schedule else default
    source = transformer.source
    where = str(source.files[0].absolute())
    variant = source.variant
    if variant is None and source.state:
        raise UserError(
            f"{source.files[0]}: a trainer's file does not say what it was distilled into; give --variant distill "
            "(4 steps), causvid (9 steps, block by block) or self_forcing (4 steps, block by block)"
        )
    if variant is None:
        variant = "base"
        notes.append(
            "transformer: nothing in the names says that it is distilled, so it gets the base model's schedule; "
            "--variant says otherwise"
        )
    schedule = default_schedule(variant, transformer.config, where)
    if transformer.config.model_type == "i2v" and resolution_in(where) is None and not options.schedule:
        notes.append("transformer: taken as the 480P model, as no name says 720P; if it is, give --schedule i2v_720p")
    if options.schedule:
        schedule = override_schedule(options.schedule, schedule)
        if variant == "base" and options.schedule in SCHEDULES and schedule.is_distilled:
            variant = options.schedule
    return variant, schedule


def _missing(present: set[str], transformer: WanConfig | None) -> Iterator[str]:
    image = transformer is not None and transformer.model_type == "i2v"
    needed = ["transformer", "vae", "text_encoder", *(["image_encoder"] if image else []), "tokenizer"]
    lacking = [name for name in needed if name not in present]
    if lacking:
        yield f"to run it, these are still missing: {', '.join(lacking)}; --reuse CHECKPOINT takes them from another"
