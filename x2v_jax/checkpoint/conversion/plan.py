"""Decides all that a conversion will do, and refuses what cannot be done, from names and headers alone."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from x2v_jax.checkpoint.conversion.choose import (
    check_smoothing,
    choose_quantization,
    choose_smoothing,
    quantization_notes,
)
from x2v_jax.checkpoint.conversion.from_native import carried_over, open_native_source
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.conversion.stream import Findings, stream
from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor, Streamed
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into
from x2v_jax.checkpoint.lora.report import requantized
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.published.hints import folder_names, says_distilled
from x2v_jax.checkpoint.published.layouts import Layout, recognise
from x2v_jax.checkpoint.published.open import PublishedNetwork, open_source, source_notes
from x2v_jax.checkpoint.published.published_schedules import (
    SCHEDULES,
    default_schedule,
    flow_shift,
    override_schedule,
    resolution_in,
    with_flow_shift,
)
from x2v_jax.checkpoint.published.select import select
from x2v_jax.checkpoint.quantize.calibration import Calibration
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS, Schedule, WanConfig

Lenders = dict[str, NativeCheckpoint]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a conversion will do.

    quantizations: of the components that are 8-bit in the result. smoothing: component -> alpha, of those that are
    smoothed. calibration: the recording by which they are. earlier_loras, earlier_calibration: entries of the
    provenance, of what a native source has merged or was smoothed by already. notes: sentences for the user. findings:
    filled while streams are read.
    """

    layout: Layout
    opened: Mapping[str, PublishedNetwork]
    streams: Mapping[str, Mapping[str, Streamed]]
    quantizations: Mapping[str, str]
    smoothing: Mapping[str, float]
    calibration: Calibration | None
    references: Mapping[str, str]
    tokenizer: pathlib.Path | None
    task: str | None
    variant: str
    schedule: Schedule
    earlier_loras: Sequence[Mapping[str, Any]]
    earlier_calibration: Mapping[str, Any] | None
    notes: tuple[str, ...]
    findings: Findings

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for streams in self.streams.values() for s in streams.values())

    @property
    def source_files(self) -> list[pathlib.Path]:
        """Every file that the result depends on, LoRAs aside."""
        files = [f for o in self.opened.values() for f in (*o.source.files, o.source.config_file) if f]
        scheduler = self.layout.scheduler_file
        files += [scheduler] if scheduler is not None and "transformer" in self.opened else []
        return list(dict.fromkeys([*files, *([self.tokenizer] if self.tokenizer else [])]))


def make_plan(
    source: str | os.PathLike[str], options: ConversionOptions, destination: str | os.PathLike[str] = "."
) -> Plan:
    """Opens and checks everything that a conversion needs.

    Raises:
        UserError: as `convert.convert`.
    """
    check_smoothing(options)
    layout = recognise(pathlib.Path(source))
    native = open_checkpoint(layout.path) if layout.kind == "native" else None
    notes: list[str] = []
    reuse = open_checkpoint(options.reuse) if options.reuse else None
    lenders = _lenders(reuse, options.components)
    if native is None:
        opened = _open_all(layout, options, lenders, notes)
    else:
        opened, lenders = open_native_source(native, options, lenders)
    transformer = opened["transformer"].config if "transformer" in opened else None
    if transformer and transformer.model_type == "t2v":
        lenders.pop("image_encoder", None)
        if not options.components and opened.pop("image_encoder", None):
            notes.append("image_encoder left out: a text-to-video model does not use it")
    _check_fit(opened, lenders)
    quantizations = choose_quantization(opened, options)
    tensors = {name: one.found.tensors for name, one in opened.items()}
    merging: list[str] = []
    if options.loras:
        quantization = quantizations.get("transformer")
        tensors["transformer"] = _merge_loras(opened.get("transformer"), options, quantization, merging)
    notes += [*quantization_notes(opened, tensors, quantizations, options), *merging]
    smoother, calibration = choose_smoothing(opened, tensors, quantizations, options, notes)
    smoothing = {} if smoother is None else {"transformer": smoother.alpha}
    findings = Findings()
    streams: dict[str, dict[str, Streamed]] = {}
    earlier_alpha = native.smoothing("transformer") if native and "transformer" in opened else None
    if native and earlier_alpha is not None and options.quantize == "none":
        notes.append(f"transformer: the factors that it was smoothed with (alpha {earlier_alpha:g}) are undone")
    elif native and earlier_alpha is not None:
        smoothing["transformer"] = earlier_alpha
        streams["transformer"] = carried_over(native, "transformer", findings)
    for name, one in opened.items():
        if name in streams:
            continue
        own = smoother if name == "transformer" else None
        streams[name], mixed = stream(one, tensors[name], options.dtype, quantizations[name], findings, own)
        if mixed:
            notes.append(f"{name}: {mixed} parameters have layers of several types; they are stored as the widest")
    if native is None:
        variant, schedule = _variant_and_schedule(layout, opened.get("transformer"), options, reuse, notes)
    else:
        variant, schedule = _overridden(native.variant, native.schedule, options)
    tokenizer = None if "tokenizer" in lenders or options.components else _tokenizer(layout, native)
    if tokenizer is not None:
        read_json(tokenizer)  # refuses what a clone without Git LFS or a broken download left there
    notes += _missing({*opened, *lenders, *(["tokenizer"] if tokenizer else [])}, transformer)
    return Plan(
        layout=layout,
        opened=opened,
        streams=streams,
        quantizations={name: q for name, q in quantizations.items() if q},
        smoothing=smoothing,
        calibration=calibration,
        references=_references(lenders, pathlib.Path(destination)),
        tokenizer=tokenizer,
        task=transformer.model_type if transformer else None,
        variant=variant,
        schedule=schedule,
        earlier_loras=_loras_of(native),
        earlier_calibration=_provenance_of(native).get("calibration") if "transformer" in smoothing else None,
        notes=tuple(notes),
        findings=findings,
    )


def _open_all(
    layout: Layout, options: ConversionOptions, lenders: Lenders, notes: list[str]
) -> dict[str, PublishedNetwork]:
    """Opens every network; what is wrong is said of all of them at once."""
    notes += [f"{path} is left aside: Wan2.1 has no such part" for path in layout.unknown_parts]
    problems: list[str] = []
    opened: dict[str, PublishedNetwork] = {}
    for component, source in select(layout, options.variant, options.components, tuple(lenders)).items():
        one, wrong = open_source(source, options.settings.get(component))
        if wrong:
            problems.append(f"{source.location} ({component}): {'. '.join(wrong)}")
        else:
            opened[component] = one
            notes += source_notes(one)
    if problems:
        fix = "The files are incomplete or of another model: download them again or give others"
        raise UserError(f"{'; '.join(problems)}. {fix}")
    return opened


def _lenders(reuse: NativeCheckpoint | None, asked: Sequence[str]) -> Lenders:
    return {c: reuse for c in (*COMPONENTS[1:], "tokenizer") if reuse and reuse.has(c) and c not in asked}


def _references(lenders: Lenders, destination: pathlib.Path) -> dict[str, str]:
    references: dict[str, str] = {}
    for component, lender in lenders.items():
        holder = pathlib.Path(os.path.abspath(lender.holder(component).path))
        # Side by side, the two can be moved together; anywhere else only the absolute path is sure.
        near = holder.parent == pathlib.Path(os.path.abspath(destination)).parent
        references[component] = f"../{holder.name}" if near else str(holder)
    return references


def _tokenizer(layout: Layout, native: NativeCheckpoint | None) -> pathlib.Path | None:
    return layout.tokenizer if native is None else native.tokenizer_file()


def _provenance_of(native: NativeCheckpoint | None) -> Mapping[str, Any]:
    provenance = native.model.get("provenance") if native else None
    return provenance if isinstance(provenance, dict) else {}


def _loras_of(native: NativeCheckpoint | None) -> list[Mapping[str, Any]]:
    loras = _provenance_of(native).get("loras")
    return [entry for entry in loras if isinstance(entry, dict)] if isinstance(loras, list) else []


def _check_fit(opened: Mapping[str, PublishedNetwork], lenders: Lenders) -> None:
    """The networks of one checkpoint must fit each other."""
    configs: dict[str, Any] = {name: one.config for name, one in opened.items()}
    configs |= {name: lender.config(name) for name, lender in lenders.items() if name != "tokenizer"}
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


def _merge_loras(
    one: PublishedNetwork | None, options: ConversionOptions, quantization: str | None, notes: list[str]
) -> dict[str, LazyTensor]:
    if one is None:
        raise UserError("--lora: no transformer is converted; add --component transformer or leave --lora out")
    files = [(LoraFile.open(path), strength) for path, strength in options.loras]
    found = one.found
    merged, report = merge_into(found.tensors, files, options.allow_partial, "give --allow-partial")
    notes += [*map(str, report.files), *report.notes]
    again = sum(merged[key] is not found.tensors[key] for key in found.kept)
    if quantization is not None and again:
        notes.append(requantized(again, quantization))
    distills = any(says_distilled(pathlib.Path(path).name) for path, strength in options.loras if strength)
    if options.schedule is None and distills:
        notes.append(
            "the LoRA's name says that it distills, and the schedule is still the base model's; give --schedule "
            "distill to make its few steps without guidance the checkpoint's own"
        )
    return merged


def _variant_and_schedule(
    layout: Layout,
    transformer: PublishedNetwork | None,
    options: ConversionOptions,
    reuse: NativeCheckpoint | None,
    notes: list[str],
) -> tuple[str, Schedule]:
    if transformer is None:
        default = reuse.schedule if reuse else default_schedule("base", None)
        return "base", override_schedule(options.schedule, default) if options.schedule else default
    source = transformer.source
    where = str(source.files[0].absolute())
    variant = source.variant
    if source.asks and options.variant is None and options.schedule is None:
        raise UserError(
            f"{source.files[0]}: {source.asks!r} in the names says that it is distilled, and not for which steps; give "
            "--schedule distill (1000, 750, 500, 250), --schedule with a JSON of its own settings, or --variant base "
            "where it is not distilled"
        )
    if variant is None and source.state:
        raise UserError(
            f"{source.files[0]}: a trainer's file does not say what it was distilled into; give --variant distill "
            "(4 steps), causvid (9 steps, block by block) or self_forcing (4 steps, block by block)"
        )
    taken_as_base = variant is None or (variant == "base" and source.is_guess)
    variant = variant or "base"
    if taken_as_base and options.variant is None and not options.schedule:
        notes.append(
            "transformer: nothing in the names says that it is distilled, so it gets the base model's schedule; "
            "--variant says otherwise"
        )
    elif source.is_guess and options.variant not in (None, "base"):
        notes.append(f"transformer: taken as {options.variant!r}, as --variant says; its place is that of base weights")
    schedule = default_schedule(variant, transformer.config, where)
    stated = flow_shift(layout.scheduler_file)
    schedule, note = with_flow_shift(schedule, stated, transformer.config, folder_names(layout.path))
    notes += [note] if note else []
    if transformer.config.model_type == "i2v" and resolution_in(where) is None and not options.schedule:
        notes.append("transformer: taken as the 480P model, as no name says 720P; if it is, give --schedule i2v_720p")
    return _overridden(variant, schedule, options)


def _overridden(variant: str, schedule: Schedule, options: ConversionOptions) -> tuple[str, Schedule]:
    if options.schedule:
        schedule = override_schedule(options.schedule, schedule)
        if variant == "base" and schedule.is_distilled:
            variant = options.schedule if options.schedule in SCHEDULES else "distill"
    return variant, schedule


def _missing(present: set[str], transformer: WanConfig | None) -> Iterator[str]:
    image = transformer is not None and transformer.model_type == "i2v"
    needed = ["transformer", "vae", "text_encoder", *(["image_encoder"] if image else []), "tokenizer"]
    lacking = [name for name in needed if name not in present]
    if lacking:
        yield f"to run it, these are still missing: {', '.join(lacking)}; --reuse CHECKPOINT takes them from another"
