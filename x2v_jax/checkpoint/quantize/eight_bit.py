"""Matrices in 8 bits with a float32 scale a row: LightX2V's formulas, on NumPy alone.

    scale = max(|w|.max(row), 1e-5) / 127 (int8) or / 448 (float8_e4m3fn),   values = w / scale, rounded to nearest

Source: LightX2V tools/convert/converter.py and quant_utils.py. Ties go to the even value; LightX2V's float8 rounding
takes them away from zero. Scales are float32 whatever the weight's type, where LightX2V rounds them to it.
"""

import dataclasses
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
