"""Tells what a path holds: model, layout, variants, tensors, what is missing, how to convert it, what it takes."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.conversion.choose import stored_quantization
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import without_advice
from x2v_jax.checkpoint.lora.keys import Role
from x2v_jax.checkpoint.lora.merge import LoraFile
from x2v_jax.checkpoint.names.wan import parameter_count
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.published.key_check import other_models
from x2v_jax.checkpoint.published.layouts import LORA, Layout, NetworkFiles, recognise
from x2v_jax.checkpoint.published.open import open_source
from x2v_jax.checkpoint.published.published_schedules import default_schedule
from x2v_jax.checkpoint.published.relatives import OtherModel
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS, Schedule, WanConfig

_LAYOUTS = {
    "wan": "official Wan2.1 folder",
    "lightx2v": "LightX2V folder",
    "diffusers": "diffusers folder",
    "trainer": "trainer's checkpoint (Self-Forcing, CausVid)",
    "file": "single file",
    "native": "native checkpoint (converted)",
    "lora": "LoRA",
    "part": "file of a converted checkpoint",
    "calibration": "recorded activations (converter's `calibrate`)",
    "unknown": "unknown",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a path.

    quantization: the type of its matrices where they can be run in 8 bits. smoothing: the alpha that they were smoothed
    with before, None where they were not. problems: why it cannot be converted, or (of a converted one) run; empty
    when it can. other: the model that it is of, where that is not Wan2.1.
    """

    component: str
    variant: str | None
    where: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    bytes: int
    naming: str
    config: Mapping[str, Any] | None
    problems: tuple[str, ...] = ()
    quantization: str | None = None
    smoothing: float | None = None
    other: str | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """All that `inspect` finds. missing: what running needs and is not here. memory: phase -> bytes, at `memory_at`."""

    path: str
    layout: str
    model: str
    task: str | None
    variants: tuple[str, ...]
    networks: tuple[Network, ...]
    tokenizer: str | None
    missing: tuple[str, ...]
    left_out: Mapping[str, str]
    commands: tuple[str, ...]
    memory: Mapping[str, int]
    memory_at: str

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


Memory = Callable[[Mapping[str, Any], Schedule, Collection[str], Collection[str]], Mapping[str, int]]


def inspect(path: str | pathlib.Path, memory: Memory = lambda *sizes: {}) -> Description:
    """Describes a file or folder; reads names and headers only.

    Args:
        memory: predicts the bytes of each phase of a run from the networks' configs, the schedule, which networks are
            8-bit, and which of these are smoothed.

    Raises:
        UserError: it does not exist or a file in it is damaged.
    """
    layout = recognise(path)
    if layout.kind == "native":
        return _native(open_checkpoint(layout.path), memory)
    networks, configs = [], {}
    for source in sorted(layout.sources, key=lambda s: COMPONENTS.index(s.component)):
        network, config = _network(source)
        networks.append(network)
        if config is not None:
            configs.setdefault(source.component, config)
    transformer = configs.get("transformer")
    schedule = default_schedule((layout.variants or ("base",))[0], transformer, str(layout.path.absolute()))
    return _describe(
        layout.path,
        layout.kind,
        networks,
        configs,
        schedule,
        memory,
        tokenizer=str(layout.tokenizer) if layout.tokenizer else None,
        left_out={str(p): reason for p, reason in layout.left_out},
        variants=layout.variants,
        # What cannot be converted would only be refused again.
        commands=() if layout.other or any(n.problems for n in networks) else _commands(layout),
        model=_name_of_other(layout, networks),
    )


def _name_of_other(layout: Layout, networks: Iterable[Network]) -> str | None:
    """Of other models than Wan2.1, and of files that hold no network to convert; None of others."""
    others = [layout.other[0]] if layout.other else [network.other for network in networks if network.other]
    if others:
        return f"{others[0]}, which this project does not run"
    if layout.kind == "lora" and layout.path.is_file():
        return _lora_name(layout.path)
    if layout.kind == "unknown" and layout.path.is_file():
        return layout.left_out[0][1]
    return {"part": "part of a converted checkpoint", "calibration": "recorded activations, for --smooth"}.get(
        layout.kind
    )


def _lora_name(path: pathlib.Path) -> str:
    lora = LoraFile.open(path)
    ranks = sorted({module.tensors[Role.DOWN].shape[0] for module in lora.modules if module.has_pair})
    rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    return f"LoRA for Wan2.1, {len(lora.modules)} modules{rank}"


def _network(source: NetworkFiles) -> tuple[Network, Any]:
    config, problems, wrong, quantization, other = None, [], None, None, None
    try:
        opened, problems = open_source(source)
        config, quantization = opened.config, stored_quantization(opened)
    except UserError as error:
        wrong = str(error)
        other = error.name if isinstance(error, OtherModel) else None
    raw = source.read().tensors
    tensors = list(raw.values())
    return (
        Network(
            source.component,
            source.variant,
            source.location + (f" [{source.state}]" if source.state else ""),
            len(tensors),
            parameter_count(source.component, config) if config else sum(t.size for t in tensors),
            _dtypes(tensors),
            sum(t.nbytes for t in tensors),
            source.naming,
            config.to_dict() if config else None,
            tuple(problems) + ((wrong,) if wrong else ()),
            quantization,
            other=other or " and ".join(other_models(raw)) or None,
        ),
        config,
    )


def _dtypes(tensors: Iterable[LazyTensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _native(checkpoint: NativeCheckpoint, memory: Memory) -> Description:
    networks, configs = [], {}
    for component in COMPONENTS:
        if not checkpoint.has(component):
            continue
        config = configs[component] = checkpoint.config(component)
        problems: tuple[str, ...] = ()
        tensors: list[LazyTensor] = []
        try:
            tensors = list(checkpoint.tensors(component).values())
        except UserError as error:
            problems = (without_advice(str(error)),)
        networks.append(
            Network(
                component,
                checkpoint.variant if component == "transformer" else None,
                ", ".join(str(file) for file in checkpoint.files(component)),
                len(tensors),
                parameter_count(component, config),
                _dtypes(tensors),
                sum(t.nbytes for t in tensors),
                "native",
                config.to_dict(),
                problems,
                checkpoint.quantization(component),
                checkpoint.smoothing(component),
            )
        )
    tokenizer = checkpoint.tokenizer_file()
    path = shlex.quote(str(checkpoint.path))
    return _describe(
        checkpoint.path,
        "native",
        networks,
        configs,
        checkpoint.schedule,
        memory,
        tokenizer=str(tokenizer) if tokenizer else None,
        left_out={},
        variants=(checkpoint.variant,),
        # What is damaged would not run.
        commands=() if any(n.problems for n in networks) else (shipped.command(f"infer --config.checkpoint={path}"),),
    )


def _describe(
    path: pathlib.Path,
    kind: str,
    networks: list[Network],
    configs: Mapping[str, Any],
    schedule: Schedule,
    memory: Memory,
    *,
    tokenizer: str | None,
    left_out: Mapping[str, str],
    variants: tuple[str, ...],
    commands: tuple[str, ...],
    model: str | None = None,
) -> Description:
    transformer: WanConfig | None = configs.get("transformer")
    present = {network.component for network in networks} | ({"tokenizer"} if tokenizer else set())
    image = transformer is not None and transformer.model_type == "i2v"
    needed = ("transformer", "vae", "text_encoder", *(("image_encoder",) if image else ()), "tokenizer")
    quantized = {network.component for network in networks if network.quantization}
    smoothed = {network.component for network in networks if network.smoothing is not None}
    phases = dict(memory(configs, schedule, quantized, smoothed))
    return Description(
        path=str(path),
        layout=kind,
        model=model or _model_name(transformer, present),
        task=transformer.model_type if transformer else None,
        variants=variants,
        networks=tuple(networks),
        tokenizer=tokenizer,
        missing=tuple(name for name in needed if name not in present) if networks else (),
        left_out=dict(left_out),
        commands=commands,
        memory=phases,
        memory_at=f"{schedule.width}x{schedule.height}, {schedule.num_frames} frames" if phases else "",
    )


def _model_name(config: WanConfig | None, present: Iterable[str]) -> str:
    if config is None:
        names = [c for c in COMPONENTS if c in set(present)]
        return f"Wan2.1 {', '.join(names)}" if names else "no network of Wan2.1"
    published = {
        (1536, 30): "1.3B",
        (5120, 40): "14B",
    }.get((config.dim, config.num_layers))
    size = published or f"of another size ({_count(parameter_count('transformer', config))} parameters)"
    return f"Wan2.1 {config.model_type.upper()} {size}"


def _commands(layout: Layout) -> tuple[str, ...]:
    path = shlex.quote(str(layout.path))
    if layout.kind == "lora":
        files = [file for file, reason in layout.left_out if reason == LORA]
        return tuple(shipped.command(f"convert wan MODEL DST --lora {shlex.quote(str(file))}") for file in files)
    if layout.kind == "calibration":
        return (shipped.command(f"convert wan MODEL DST --quantize int8 --smooth {path}"),)
    if not layout.sources:
        return ()
    if asks := [s for s in layout.of("transformer") if s.asks]:
        return (shipped.command(f"convert wan {path} DST --schedule JSON|NAME  ({asks[0].asks}: for which steps?)"),)
    states = [s for s in layout.of("transformer") if s.state and s.variant is None]
    if states:
        return (shipped.command(f"convert wan {path} DST --variant distill|causvid|self_forcing"),)
    if len(layout.variants) > 1:
        return tuple(shipped.command(f"convert wan {path} DST --variant {variant}") for variant in layout.variants)
    return (shipped.command(f"convert wan {path} DST"),)


def to_text(found: Description, counted: str = "") -> str:
    """The description as lines for people. counted: what the memory's numbers count."""
    lines = [f"{found.path}: {found.model}", f"  layout     {_LAYOUTS[found.layout]}"]
    if found.variants:
        lines.append(f"  variants   {', '.join(found.variants)}")
    for network in found.networks:
        variant = f" ({network.variant})" if network.variant else ""
        dtypes = ", ".join(f"{name} x{count}" for name, count in network.dtypes.items())
        lines.append(f"  {network.component}{variant}")
        lines.append(f"    {network.where}")
        if network.tensors:
            lines.append(
                f"    {network.tensors:,} tensors, {_count(network.parameters)} parameters, {_size(network.bytes)}, "
                f"{network.naming} names; {dtypes}"
            )
        if network.quantization:
            smoothed = "" if network.smoothing is None else f", smoothed with alpha {network.smoothing:g}"
            lines.append(
                f"    matrices of the blocks: {network.quantization}{smoothed}; --layers tells of each, --against SRC "
                "of errors"
            )
        wrong = "damaged or incomplete" if found.layout == "native" else "cannot be converted"
        lines += [f"    {wrong}: {problem}" for problem in network.problems]
    if found.networks:
        lines.append(f"  tokenizer  {found.tokenizer or 'not here'}")
    if found.missing and not any(network.other for network in found.networks):
        lines.append(f"  missing    {', '.join(found.missing)} (--reuse CHECKPOINT takes them from another)")
    lines += [f"  not used   {path}: {reason}" for path, reason in found.left_out.items()]
    if found.memory:
        phases = ", ".join(f"{phase} {_size(count)}" for phase, count in found.memory.items())
        peak = _size(max(found.memory.values()))
        lines.append(f"  memory     {peak} on the device for {found.memory_at}")
        lines.append(f"             {phases}")
        lines.append(f"             counted: {counted}")
    damaged = [network.component for network in found.networks if network.problems]
    if found.layout == "native" and damaged:
        lines.append(f"  damaged    {', '.join(damaged)}: it cannot be run; copy the whole folder or convert it again")
    for command in found.commands:
        lines.append(f"  {'run' if found.layout == 'native' else 'convert'}{'':4}{command}")
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
