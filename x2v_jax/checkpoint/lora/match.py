"""Decides what every tensor of every LoRA file changes, and refuses what does not fit before anything is computed."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from x2v_jax.checkpoint.lora.keys import ModelNames, Role
from x2v_jax.checkpoint.lora.read import LoraFile, LoraModule
from x2v_jax.checkpoint.lora.report import LoraFileReport, LoraReport, Misfit
from x2v_jax.errors import UserError

# How users of `infer` and of Python ask for a merge of what fits; `convert` has an option of its own.
PARTIAL_OPTION = "set allow_partial to true"
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_READABLE_FLOATS = _FLOATS | {"float8_e4m3fn", "float8_e5m2"}


@runtime_checkable
class TensorLike(Protocol):
    """What a weight has to offer; LazyTensor does."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Change:
    """One summand: factor * up @ down, or factor * up where there is no `down` (a difference).

    `factor` is strength * alpha / rank of a pair and the strength of a difference.
    """

    path: pathlib.Path
    factor: float
    up: TensorLike
    down: TensorLike | None = None

    def left(self, rows: int, dtype: np.dtype) -> np.ndarray:
        """[rows, rank] of a pair, [rows, …] of a difference, already multiplied with the factor."""
        return self.up.read().astype(dtype).reshape(rows, -1) * dtype.type(self.factor)

    def right(self, dtype: np.dtype) -> np.ndarray | None:
        """[rank, elements of one row], None for a difference."""
        return None if self.down is None else self.down.read().astype(dtype).reshape(self.down.shape[0], -1)


@dataclass(frozen=True, eq=False)
class _Part:
    """Tensors of one module that belong together: a pair with its alpha, or one difference."""

    role: Role
    keys: tuple[str, ...]
    scale: float
    up: TensorLike
    down: TensorLike | None = None

    def shape(self, expected: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the change, `expected` itself when it fits, None when the two halves do not fit each other."""
        if self.down is None:
            squeezed = [n for n in self.up.shape if n != 1] == [n for n in expected if n != 1]
            return expected if squeezed else tuple(self.up.shape)
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
            return None
        # A convolution's `down` may be stored with its kernel's axes or flattened to [rank, in * kernel].
        flat = len(down) == 2 and up[0] == expected[0] and down[1] == math.prod(expected[1:])
        return expected if flat and len(expected) > 1 else (up[0], *down[1:])


def plan_merge(
    model: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    loras: Sequence[tuple[LoraFile, float]],
    allow_partial: bool = False,
    partial_option: str = PARTIAL_OPTION,
) -> tuple[dict[str, list[Change]], LoraReport]:
    """Matches files with a model.

    Args:
        model: official key -> shape and type of the weight.
        loras: files with their strengths.
        allow_partial: leave out what does not fit.
        partial_option: how the user of the program at hand asks for that.

    Returns:
        official key -> the changes to add to it (none for strength 0), and the account of every tensor.

    Raises:
        UserError: see `x2v_jax.checkpoint.lora.merge.merge_into`.
    """
    names = ModelNames(model)
    changes: dict[str, list[Change]] = {}
    reports = []
    for lora, strength in loras:
        if not math.isfinite(strength):
            raise UserError(f"lora: strength {strength} of {lora.path} is not a finite number; 1.0 is the usual one")
        used, report = _match(names, model, lora, strength)
        reports.append(report)
        for parameter, part in used:
            factor = strength * part.scale
            if factor != 0:
                changes.setdefault(parameter, []).append(Change(lora.path, factor, part.up, part.down))
    shapes = {key: shape for key, (shape, _) in model.items()}
    _refuse_misfits([r for r in reports if not (r.matched if allow_partial else r.fits)], shapes, partial_option)
    for lora in dict.fromkeys(lora for lora, _ in loras):
        _refuse_bad_values(lora)
    for key, own in changes.items():
        if model[key][1].name not in _FLOATS:
            raise UserError(
                f"lora: {own[0].path} cannot be merged into {key}, which is quantized to {model[key][1].name}. "
                "Merge it into the bfloat16 or float32 checkpoint and quantize the result."
            )
    return changes, LoraReport(tuple(reports))


def _match(
    names: ModelNames, model: Mapping[str, tuple[tuple[int, ...], np.dtype]], lora: LoraFile, strength: float
) -> tuple[list[tuple[str, _Part]], LoraFileReport]:
    used: dict[tuple[str, Role], tuple[str, _Part]] = {}
    matched, unmatched, misshapen = [], list(lora.unknown), []
    for module in lora.modules:
        unmatched += _strays(module)
        for part in _parts(module):
            parameter = names.parameter(module.name, part.role)
            if parameter is None:
                unmatched += part.keys
                continue
            expected = model[parameter][0]
            shape = part.shape(expected)
            if shape != expected:
                misshapen.append(Misfit(part.keys, parameter, shape, expected))
                continue
            place = (parameter, part.role)
            if place in used:
                other = used[place][1].keys[0]
                raise UserError(f"lora: {lora.path}: {other!r} and {part.keys[0]!r} both mean {parameter}; keep one")
            used[place] = (parameter, part)
            matched += part.keys
    parameters = tuple(dict.fromkeys(parameter for parameter, _ in used.values()))
    report = LoraFileReport(lora.path, strength, tuple(matched), parameters, tuple(unmatched), tuple(misshapen))
    return list(used.values()), report


def _parts(module: LoraModule) -> Iterator[_Part]:
    tensors, keys = module.tensors, module.keys
    if module.has_pair:
        own = tuple(keys[role] for role in (Role.DOWN, Role.UP, Role.ALPHA) if role in keys)
        yield _Part(Role.UP, own, module.scale, tensors[Role.UP], tensors[Role.DOWN])
    for role in (Role.UP_BIAS, Role.WEIGHT_DIFF, Role.BIAS_DIFF, Role.MODULATION_DIFF):
        if role in tensors:
            yield _Part(role, (keys[role],), module.scale if role == Role.UP_BIAS else 1.0, tensors[role])


def _strays(module: LoraModule) -> list[str]:
    """Keys that cannot do anything: one half of a pair, or an alpha without a pair."""
    return [] if module.has_pair else [k for r, k in module.keys.items() if r in (Role.DOWN, Role.UP, Role.ALPHA)]


def _refuse_misfits(reports: Sequence[LoraFileReport], shapes: Mapping[str, tuple[int, ...]], option: str) -> None:
    if not reports:
        return
    lines = ["lora: not every tensor fits this model" if any(r.matched for r in reports) else "lora: no tensor fits"]
    for report in reports:
        account, *details = str(report).split("\n")
        reasons = report.reasons(shapes)
        lines += [account, *([f"  likely reason: {'; '.join(reasons)}"] if reasons else []), *details]
    lines.append(
        f"Give a LoRA made for this model, or {option} to apply only what fits; a file of which nothing fits is always "
        "refused."
    )
    raise UserError("\n".join(lines))


def _refuse_bad_values(lora: LoraFile) -> None:
    for module in lora.modules:
        for role, tensor in module.tensors.items():
            if role == Role.ALPHA:
                continue  # checked when the file was opened
            if tensor.dtype.name not in _READABLE_FLOATS:
                raise UserError(
                    f"lora: {lora.path}: {module.keys[role]!r} is {tensor.dtype.name}; a LoRA's tensors are "
                    "floating-point numbers. Give the file before quantization."
                )
            if not np.isfinite(tensor.read().astype(np.float32)).all():
                raise UserError(
                    f"lora: {lora.path}: {module.keys[role]!r} holds NaN or infinity; download or train it again"
                )
