"""8-bit weights of published files with their scales: as they are, and dequantized in float32.

LightX2V stores KEY.weight in int8 or fp8 beside KEY.weight_scale, one a row; DeepGEMM's files have one a 128x128 block,
ComfyUI's a single KEY.scale_weight. Those of a row, or of a whole matrix (the same scale in every row), can be run as
they are.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.quantize.eight_bit import EightBit
from x2v_jax.models.config import QUANTIZATIONS

_BLOCK = 128
_EIGHT_BIT = frozenset(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors without their scales.

    tensors: key -> tensor, of 8-bit ones the product with the scale, in float32. own: key -> the keys it was made of.
    quantized: keys that were 8-bit. kept: of these, the matrices that can be run in 8 bits, as the file has them.
    problems: sentences about those that cannot be used.
    """

    tensors: Mapping[str, LazyTensor]
    own: Mapping[str, tuple[str, ...]]
    quantized: frozenset[str]
    kept: Mapping[str, EightBit]
    problems: tuple[str, ...]


def join_scales(raw: Mapping[str, LazyTensor]) -> Weights:
    """Multiplies 8-bit weights out with their scales, when they are read. Scales are never rounded."""
    scale_of = {weight: key for key in raw if (weight := _weight_of(key)) in raw}
    scales = set(scale_of.values())
    tensors: dict[str, LazyTensor] = {}
    quantized: set[str] = set()
    kept: dict[str, EightBit] = {}
    problems: list[str] = []
    by_row = any(key.endswith("weight_scale") for key in scales)
    for key in raw.keys() - scales:
        tensors[key] = weight = raw[key]
        scale = raw[scale_of[key]] if key in scale_of else None
        if scale is None and weight.dtype.name not in _EIGHT_BIT:
            continue
        if scale is None and (weight.dtype.name == "int8" or by_row):
            problems.append(
                f"{key} is {weight.dtype.name} and {key}_scale is missing; its values mean nothing without it"
            )
        elif scale is not None and not _fits(weight.shape, scale.shape):
            problems.append(
                f"{key} has shape {list(weight.shape)} and its scale {list(scale.shape)}; it must be one a tensor, row "
                f"or {_BLOCK}x{_BLOCK} block"
            )
        elif one := _as_rows(weight, scale):
            kept[key] = one
        tensors[key] = _multiplied(weight, scale)
        quantized.add(key)
    ordered = [key for key in raw if key in tensors]
    own = {key: (key, scale_of[key]) if key in scale_of else (key,) for key in ordered}
    return Weights({key: tensors[key] for key in ordered}, own, frozenset(quantized), kept, tuple(sorted(problems)))


def _weight_of(key: str) -> str | None:
    if key.endswith("weight_scale"):
        return key.removesuffix("_scale")
    return key.removesuffix("scale_weight") + "weight" if key.endswith(".scale_weight") else None


def _fits(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return math.prod(scale) == 1 or _is_by_row(shape, scale) or scale == tuple(-(-n // _BLOCK) for n in shape)


def _is_by_row(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return bool(shape) and scale in ((shape[0],), (shape[0], 1))


def _as_rows(weight: LazyTensor, scale: LazyTensor | None) -> EightBit | None:
    """The matrix with one scale a row; None where it is no matrix, or has scales of another kind."""
    if weight.ndim != 2 or weight.dtype.name not in QUANTIZATIONS:
        return None
    rows = weight.shape[:1]
    if scale is not None and math.prod(scale.shape) != 1 and not _is_by_row(weight.shape, scale.shape):
        return None

    def load() -> np.ndarray:
        values = np.ones(1) if scale is None else scale.read().reshape(-1)
        return np.array(np.broadcast_to(values, rows), np.float32)

    return EightBit(weight, LazyTensor(rows, np.dtype(np.float32), load), scale and scale.dtype.name)


def _multiplied(weight: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    def load() -> np.ndarray:
        values = weight.read().astype(np.float32)
        if scale is None:
            return values
        factors = scale.read().astype(np.float32)
        if factors.size == 1:
            factors = factors.reshape(())
        elif _is_by_row(values.shape, factors.shape):
            factors = factors.reshape(-1, *[1] * (values.ndim - 1))
        else:
            factors = factors.repeat(_BLOCK, 0)[: values.shape[0]].repeat(_BLOCK, 1)[:, : values.shape[1]]
        values *= factors
        return values

    return LazyTensor(weight.shape, np.dtype(np.float32), load)
