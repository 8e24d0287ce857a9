"""Opens a LoRA file of any published dialect as a list of modules with their tensors, before any model is known."""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import read_metadata, read_safetensors
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.checkpoint.lora.keys import Role, parse_key, refused_kind
from x2v_jax.errors import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True, eq=False)
class LoraModule:
    """What a LoRA file holds for one module.

    Attributes:
        name: the module as the file writes it, prefix included.
        keys: the file's key of each role.
        tensors: the tensor of each role: DOWN [rank, in…], UP [out, rank], differences in the parameter's shape.
        scale: what up @ down is multiplied with before the strength: alpha / rank, 1 where the file states no alpha.
    """

    name: str
    keys: Mapping[Role, str]
    tensors: Mapping[Role, LazyTensor]
    scale: float = 1.0

    @property
    def has_pair(self) -> bool:
        return Role.DOWN in self.tensors and Role.UP in self.tensors


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file, parsed but not read: only shapes and the scalar alphas are in memory.

    Attributes:
        path: the file. Two files are two LoRAs even where their names without folder and suffix agree.
        modules: everything in it that changes a module.
        unknown: keys that no LoRA dialect explains.
    """

    path: pathlib.Path
    modules: tuple[LoraModule, ...]
    unknown: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Parses a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file.

        Where the file has no `alpha` tensors but says how it is scaled, as diffusers does in the safetensors metadata
        and peft in the `adapter_config.json` beside `adapter_model.safetensors`, that scale is used.

        Raises:
            UserError: the file is missing or broken, holds no LoRA tensors, holds DoRA, LoHa, LoKr or another
                parametrisation that is not a product of two matrices, or gives one tensor of a module twice.
        """
        path = pathlib.Path(path)
        tensors, stated = _read(path)
        for key in tensors:
            if kind := refused_kind(key):
                raise UserError(
                    f"lora: {path} is a {kind} file (key {key!r}), which is no sum of low-rank products. Give a plain "
                    "LoRA: merge this one with the tool that trained it and extract lora_down / lora_up pairs."
                )
        modules, unknown = _group(path, tensors)
        if not modules:
            sample = ", ".join(list(tensors)[:3]) or "no tensors at all"
            raise UserError(
                f"lora: {path} holds no LoRA tensors (it has {sample}). Give a file of lora_A / lora_B or "
                f"lora_down / lora_up pairs; whole checkpoints are converted with {shipped.command('convert wan')}."
            )
        scaling = _Scaling.from_config(path, stated) if stated else None
        made = tuple(_module(path, name, keys, tensors, scaling) for name, keys in modules.items())
        return cls(path, made, tuple(unknown))


def _read(path: pathlib.Path) -> tuple[dict[str, LazyTensor], Mapping[str, Any] | None]:
    """The file's tensors by flat key and what it, or the configuration beside it, says about scaling."""
    if path.is_dir():
        raise UserError(f"lora: {path} is a folder; give the LoRA file in it, for instance {path / 'NAME.safetensors'}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"lora: {path} is none of {', '.join(SUFFIXES)}; give the LoRA file itself")
    if suffix == ".safetensors":
        tensors = dict(read_safetensors(path))
        stated = _json(path, read_metadata(path).get("lora_adapter_metadata"))
    else:
        tensors = dict(_flatten(read_torch_file(path)))
        stated = None
    beside = path.with_name("adapter_config.json")
    if stated is None and path.stem == "adapter_model" and beside.is_file():
        stated = _json(beside, beside.read_text(encoding="utf-8", errors="replace"))
    return tensors, stated


def _json(path: pathlib.Path, text: str | None) -> Mapping[str, Any] | None:
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"lora: the LoRA settings in {path} are not a JSON object; download the file again")
    return value


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
    """Tensors of a nested torch file with joined keys; an alpha may also be a plain number, other values are notes."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flatten(child, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, LazyTensor):
        yield prefix, value
    elif prefix.endswith(".alpha") and isinstance(value, int | float):
        number = np.asarray(value, np.float64)
        yield prefix, LazyTensor((), number.dtype, lambda: number)


def _group(path: pathlib.Path, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, dict[Role, str]], list[str]]:
    modules: dict[str, dict[Role, str]] = {}
    unknown, adapters = [], {}
    for key in tensors:
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        if parsed.role in (Role.DOWN, Role.UP):
            adapters.setdefault(parsed.adapter, key)
        keys = modules.setdefault(parsed.module, {})
        if parsed.role in keys and len(adapters) < 2:
            raise UserError(
                f"lora: {path} gives {keys[parsed.role]!r} and {key!r}, two tensors for one place; keep one"
            )
        keys[parsed.role] = key
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "(unnamed)" for name in adapters))
        raise UserError(f"lora: {path} holds several adapters: {names}. Save each in a file of its own.")
    return modules, unknown


def _module(
    path: pathlib.Path,
    name: str,
    keys: Mapping[Role, str],
    tensors: Mapping[str, LazyTensor],
    scaling: "_Scaling | None",
) -> LoraModule:
    own = {role: tensors[key] for role, key in keys.items()}
    scale = 1.0
    if Role.DOWN in own:
        rank = own[Role.DOWN].shape[0] if own[Role.DOWN].shape else 0
        if rank == 0:
            raise UserError(f"lora: {path}: {keys[Role.DOWN]!r} has rank 0; download the file again")
        if Role.ALPHA in own:
            scale = _alpha(path, keys[Role.ALPHA], own[Role.ALPHA]) / rank
        elif scaling is not None:
            scale = scaling.of(name, rank)
    return LoraModule(name, dict(keys), own, scale)


def _alpha(path: pathlib.Path, key: str, tensor: LazyTensor) -> float:
    if math.prod(tensor.shape) != 1:
        raise UserError(f"lora: {path}: {key!r} has shape {list(tensor.shape)}; an alpha is a single number")
    alpha = float(np.asarray(tensor.read(), np.float64).reshape(()))
    if not math.isfinite(alpha):
        raise UserError(f"lora: {path}: {key!r} is {alpha}; download or train the file again")
    return alpha


@dataclass(frozen=True)
class _Scaling:
    """The scale that peft's LoraConfig states: lora_alpha / r, or / sqrt(r) with rsLoRA, with exceptions by name."""

    alpha: float | None
    alpha_of: Mapping[str, float]
    square_root: bool

    @classmethod
    def from_config(cls, path: pathlib.Path, config: Mapping[str, Any]) -> Self:
        # diffusers packs the settings of several networks in one object and names the network before each.
        plain = {key.removeprefix("transformer."): value for key, value in config.items()}
        if plain.get("use_dora"):
            raise UserError(f"lora: {path} says use_dora; DoRA is no sum of low-rank products. Give a plain LoRA.")
        alpha, patterns = plain.get("lora_alpha"), plain.get("alpha_pattern") or {}
        numbers = [*patterns.values()] if isinstance(patterns, dict) else [math.nan]
        numbers += [] if alpha is None else [alpha]
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise UserError(f"lora: the lora_alpha or alpha_pattern stated for {path} is not a number; mend it")
        named = {name.removeprefix("^").removesuffix("$").replace("\\.", "."): n for name, n in patterns.items()}
        if odd := [name for name in named if not re.fullmatch(r"[\w.]+", name)]:
            raise UserError(
                f"lora: the alpha_pattern {odd[0]!r} stated for {path} is a regular expression, which is not "
                "supported; write the names of its modules instead"
            )
        return cls(alpha, named, bool(plain.get("use_rslora")))

    def of(self, module: str, rank: int) -> float:
        alpha = next((n for name, n in self.alpha_of.items() if f".{module}".endswith(f".{name}")), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.square_root else rank)
