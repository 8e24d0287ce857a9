"""Merges LoRA files into a model's weights: W + strength * (alpha / rank * up @ down) + strength * difference.

The sum is taken in float32 and rounded once to the weight's own type, whatever the number of files, so that the order
of the files does not matter and a LoRA taken off again (negative strength) leaves only rounding. 8-bit weights are
dequantized with their scales for it, and rounded to 8 bits again with new ones. LightX2V instead rounds to bfloat16
after every file, ignores `alpha`, and passes over tensors that fit nothing; here each tensor is accounted for and a
misfit is an error unless a partial merge is asked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.lora.match import PARTIAL_OPTION, Change, TensorLike, plan_merge
from x2v_jax.checkpoint.lora.read import LoraFile
from x2v_jax.checkpoint.lora.report import LoraFileReport, LoraReport, Misfit, requantized
from x2v_jax.checkpoint.names.smoothing import is_smoothed
from x2v_jax.checkpoint.names.wan import Row
from x2v_jax.checkpoint.quantize.eight_bit import dequantize, quantization_of, quantize
from x2v_jax.errors import UserError

__all__ = [
    "LoraFile",
    "LoraFileReport",
    "LoraReport",
    "Misfit",
    "TensorLike",
    "merge_into",
    "merge_into_native",
]

# Rows of a weight are merged in pieces of about this many elements: temporaries of 16 MB however large the weight.
_PIECE = 1 << 22


def merge_into(
    tensors: Mapping[str, TensorLike],
    loras: Sequence[tuple[LoraFile, float]],
    allow_partial: bool = False,
    partial_option: str = PARTIAL_OPTION,
) -> tuple[dict[str, Any], LoraReport]:
    """Adds LoRA files to the weights of a transformer given by official names.

    Args:
        tensors: official key -> weight; only shapes and types are looked at now.
        loras: files with their strengths. Strength 0 leaves every weight untouched, bit for bit.
        allow_partial: apply what fits and only report the rest.
        partial_option: how the user of the program at hand asks for that; it stands in the refusal.

    Returns:
        The same keys in the same order; a changed weight is a LazyTensor which merges when it is read, the others are
        the very objects that were given. And the account of every tensor of every file.

    Raises:
        UserError: a tensor matches no parameter or has the wrong shape (unless `allow_partial`; but a file of which
            nothing fits is always refused), holds NaN or infinity, or is to be merged into quantized weights.
    """
    changes, report = plan_merge(
        {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, loras, allow_partial, partial_option
    )
    merged: dict[str, Any] = dict(tensors)
    for key, own in changes.items():
        merged[key] = _merged(key, tensors[key], own)
    return merged, report


def merge_into_native(
    tensors: Mapping[str, TensorLike],
    loras: Sequence[tuple[LoraFile, float]],
    rows: Sequence[Row],
    allow_partial: bool = False,
) -> tuple[dict[str, Any], LoraReport]:
    """Adds LoRA files to the weights of a native checkpoint, whose layers are stacked and whose axes are ours.

    Args:
        tensors: parameter name -> weight, as `NativeCheckpoint.tensors("transformer")` gives them.
        loras: files with their strengths.
        rows: `names.table("transformer", config)` of the checkpoint, of its floats even where `tensors` are 8-bit.
        allow_partial: apply what fits and only report the rest.

    Returns:
        As `merge_into`, by parameter name. Reading a changed stack copies that one stack; layers that no file changes
        keep their bits. Of 8-bit matrices, `weight` and `scale` both change.

    Raises:
        UserError: as `merge_into`.
    """
    if loras and is_smoothed(tensors):
        raise UserError(
            f"lora: {loras[0][0].path} cannot be merged into a smoothed 8-bit checkpoint, whose weights hold factors "
            "of its activations; merge it into the 16- or 32-bit checkpoint and quantize the result: "
            f"`{shipped.command('convert wan SRC DST --lora FILE --quantize int8 --smooth CALIBRATION')}`"
        )
    quantization = quantization_of(tensors)
    present = [row for row in rows if row.native in tensors]
    eight_bit = [row for row in rows if row.native not in tensors and row.is_quantizable and quantization]
    model = {}
    for row in present:
        weight = tensors[row.native]
        shape = row.transform.backward_shape(tuple(weight.shape[0 if row.layers is None else 1 :]))
        model |= {key: (shape, weight.dtype) for key in row.official_keys}
    for row in eight_bit:
        model |= {key: (row.official_shape, np.dtype(np.float32)) for key in row.official_keys}
    changes, report = plan_merge(model, loras, allow_partial)
    merged: dict[str, Any] = dict(tensors)
    again = 0
    for row in (*present, *eight_bit):
        own = {layer: (key, changes[key]) for layer, key in enumerate(row.official_keys) if key in changes}
        if own and row in present:
            merged[row.native] = _merged_stack(tensors[row.native], row, own)
        elif own:
            weight, scale = (part.native for part in row.quantized())
            merged[weight], merged[scale] = _RequantizedStack(tensors[weight], tensors[scale], own).tensors()
            again += len(own)
    if quantization is not None and again:
        report = dataclasses.replace(report, notes=(requantized(again, quantization),))
    return merged, report


def _merged(key: str, weight: TensorLike, changes: Sequence[Change]) -> LazyTensor:
    return LazyTensor(tuple(weight.shape), weight.dtype, lambda: _add(key, weight.read(), changes))


def _merged_stack(weight: TensorLike, row: Row, changes: Mapping[int, tuple[str, Sequence[Change]]]) -> LazyTensor:
    def load() -> np.ndarray:
        merged = np.array(weight.read())
        layers = merged[np.newaxis] if row.layers is None else merged
        for layer, (key, own) in changes.items():
            layers[layer] = row.transform.forward(_add(key, row.transform.backward(layers[layer]), own))
        return merged

    return LazyTensor(tuple(weight.shape), weight.dtype, load)


class _RequantizedStack:
    """Matrices in 8 bits with changes added: weight and scales come of one pass, whichever is read first."""

    def __init__(self, weight: TensorLike, scale: TensorLike, changes: Mapping[int, tuple[str, Sequence[Change]]]):
        self._weight, self._scale, self._changes = weight, scale, changes
        self._ready: dict[str, np.ndarray] = {}

    def tensors(self) -> tuple[LazyTensor, LazyTensor]:
        weight, scale = self._weight, self._scale
        return (
            LazyTensor(tuple(weight.shape), weight.dtype, lambda: self._take("weight")),
            LazyTensor(tuple(scale.shape), scale.dtype, lambda: self._take("scale")),
        )

    def _take(self, name: str) -> np.ndarray:
        if name not in self._ready:
            self._merge()
        # Handed out once: the other half waits for its reader, and a whole stack is not held any longer.
        return self._ready.pop(name)

    def _merge(self) -> None:
        weight, scale = np.array(self._weight.read()), np.array(self._scale.read())
        for layer, (key, own) in self._changes.items():
            merged = _add(key, dequantize(weight[layer], scale[layer]), own)
            weight[layer], scale[layer] = quantize(merged, weight.dtype.name, key)
        self._ready = {"weight": weight, "scale": scale}


def _add(key: str, weight: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    """weight + the sum of `changes`, computed in float32 (float64 for float64 weights) and rounded once."""
    exact = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    operands = [(c.left(weight.shape[0], exact), c.right(exact)) for c in changes]
    # A native kernel is the transpose of an official weight: the sum is taken along its memory, not across it.
    turned = weight.ndim == 2 and weight.flags.f_contiguous and not weight.flags.c_contiguous
    if turned:
        weight = weight.T
        operands = [(left.T, None) if right is None else (right.T, left.T) for left, right in operands]
    merged = np.empty(weight.shape, weight.dtype)
    rows = weight.shape[0]
    step = max(1, _PIECE * rows // max(1, weight.size))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            total = np.zeros(weight[part].shape, exact)
            for left, right in operands:
                total += (left[part] if right is None else left[part] @ right).reshape(total.shape)
            total += weight[part].astype(exact)
            merged[part] = total
            # Half precision overflows where float32 does not; the other types share its range.
            if not np.isfinite(merged[part] if weight.dtype == np.float16 else total).all():
                _refuse_overflow(key, weight, changes)
    return merged.T if turned else merged


def _refuse_overflow(key: str, weight: np.ndarray, changes: Sequence[Change]) -> NoReturn:
    if not np.isfinite(weight.astype(np.float32)).all():
        raise UserError(f"checkpoint: {key} holds NaN or infinity before any LoRA is merged; download it again")
    files = ", ".join(dict.fromkeys(str(change.path) for change in changes))
    raise UserError(
        f"lora: merging {files} takes {key} out of the range of {weight.dtype.name}; lower the strength, or convert "
        "the model to float32 first"
    )
