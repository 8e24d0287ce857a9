"""Matrices in 8 bits with their scales: LightX2V's formulas, and what published files hold. On NumPy alone.

    scale = max(|w|.max(row), 1e-5) / 127 (int8) or / 448 (float8_e4m3fn),   values = w / scale, rounded to nearest

Source: LightX2V tools/convert/converter.py and quant_utils.py. Ties go to the even value; LightX2V's float8 rounding
takes them away from zero. Scales are float32 whatever the weight's type, where LightX2V rounds them to it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.arrays import row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.errors import UserError
from x2v_jax.models.config import QUANTIZATIONS

# What the command line calls them.
WORDS = {"int8": "int8", "fp8": "float8_e4m3fn"}

DTYPES = {"int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": np.float32(127), "float8_e4m3fn": np.float32(448)}
_SMALLEST = np.float32(1e-5)
# Of published files.
_BLOCK = 128
_EIGHT_BIT = frozenset(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """What the columns [in] and the rows [out] of a matrix are multiplied by, float32; None: nothing."""

    columns: np.ndarray | None = None
    rows: np.ndarray | None = None

    def apply(self, floats: np.ndarray, part: slice = slice(None)) -> None:
        """Multiplies the rows `part` of the matrix, which are what is given, in place."""
        if self.columns is not None:
            floats *= self.columns
        if self.rows is not None:
            floats *= self.rows[part, np.newaxis]


NO_FACTORS = Factors()


@dataclasses.dataclass(frozen=True, eq=False)
class EightBit:
    """A matrix as a file has it. values: [out, in], int8 or float8_e4m3fn. scale: [out], float32 when it is read.

    scale_dtype: what the file keeps the scales in; None where it has none, which means 1.
    undo: what the product of both is still to be multiplied by, where factors went into a matrix before its 8 bits.
    """

    values: LazyTensor
    scale: LazyTensor
    scale_dtype: str | None
    undo: Callable[[], Factors] = lambda: NO_FACTORS

    @property
    def quantization(self) -> str:
        return self.values.dtype.name

    def read(self) -> np.ndarray:
        """The weight that this stands for, float32."""
        floats = dequantize(self.values.read(), self.scale.read())
        self.undo().apply(floats)
        return floats


def quantize(
    weight: np.ndarray, quantization: str, name: str, factors: Factors = NO_FACTORS
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [out, in] of floats -> (values [out, in] in 8 bits, scale [out] float32).

    Args:
        quantization: one of `names.QUANTIZATIONS`.
        name: of the weight, for the message.
        factors: multiplied in first.

    Raises:
        UserError: NaN or infinity.
    """
    values = np.empty(weight.shape, DTYPES[quantization])
    scales = np.empty(weight.shape[0], np.float32)
    start = 0
    for rows in row_pieces(weight):
        part = slice(start, start + len(rows))
        start += len(rows)
        floats = np.array(rows, np.float32)
        factors.apply(floats, part)
        largest = np.abs(floats).max(1, initial=0)
        if not np.isfinite(largest).all():
            raise UserError(
                f"{name} holds NaN or infinity, which {quantization} cannot hold and would spread over its row; "
                "download the file again"
            )
        scales[part] = np.maximum(largest, _SMALLEST) / LARGEST[quantization]
        floats /= scales[part, np.newaxis]
        values[part] = _rounded(floats, quantization)
    return values, scales


def _rounded(scaled: np.ndarray, quantization: str) -> np.ndarray:
    if quantization == "int8":
        return np.rint(scaled, out=scaled).clip(-128, 127, out=scaled)
    return scaled.clip(-448, 448, out=scaled)  # the cast rounds; beyond 448 it would give NaN


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values [out, in] * scale [out], float32."""
    floats = values.astype(np.float32)
    floats *= scale[:, np.newaxis]
    return floats


def quantization_of(tensors: Mapping[str, Any]) -> str | None:
    """The 8-bit type of a network's matrices, by its native tensors; None where they are floats."""
    found = (t.dtype.name for name, t in tensors.items() if name.endswith(".weight"))
    return next((name for name in found if name in QUANTIZATIONS), None)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of a published file without their scales.

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
    """Multiplies 8-bit weights out with their scales, when they are read. Scales are never rounded.

    LightX2V stores KEY.weight in int8 or fp8 beside KEY.weight_scale, one a row; DeepGEMM's files have one a 128x128
    block, ComfyUI's a single KEY.scale_weight. Those of a row, or of a whole matrix (the same scale in every row), can
    be run as they are.
    """
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
