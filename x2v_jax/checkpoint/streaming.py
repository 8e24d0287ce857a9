"""Turns official tensors into pieces of parameters: checked, converted to a type and transposed, a layer at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.arrays import cast, contiguous, has_nonfinite, row_pieces
from x2v_jax.checkpoint.names import Row, table
from x2v_jax.checkpoint.native_writer import Streamed
from x2v_jax.checkpoint.sources import OfficialTensors
from x2v_jax.checkpoint.tensors import LazyTensor
from x2v_jax.errors import UserError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass
class Findings:
    """What only reading the values shows: keys with NaN or infinity, by the files' own names."""

    nonfinite: list[str] = dataclasses.field(default_factory=list)


def stream(
    component: str,
    config: Any,
    found: OfficialTensors,
    tensors: Mapping[str, LazyTensor],
    dtype: str,
    findings: Findings,
) -> tuple[dict[str, Streamed], int]:
    """The parameters of a component as streams.

    Args:
        found: where the tensors come from, for messages and for which of them were 8-bit.
        tensors: official key -> tensor, LoRAs merged.
        dtype: "keep" or a name of DTYPES. Kept, 8-bit weights become bfloat16, and where the layers of a parameter
            differ in type, it becomes float32.

    Returns:
        Parameter name -> stream, and the number of parameters whose layers differ in type.
    """
    streams: dict[str, Streamed] = {}
    mixed = 0
    for row in table(component, config):
        types = {DTYPES["bfloat16"] if key in found.quantized else tensors[key].dtype for key in row.official_keys}
        mixed += len(types) > 1
        target = _common(types) if dtype == "keep" else DTYPES[dtype]

        def pieces(row: Row = row, target: np.dtype = target) -> Iterator[np.ndarray]:
            for key in row.official_keys:
                own = " + ".join(found.origin.get(key, (key,)))
                yield from _pieces(row, tensors[key], target, own, findings)

        streams[row.native] = Streamed(row.native_shape, target, pieces)
    return dict(sorted(streams.items())), mixed if dtype == "keep" else 0


def _common(types: set[np.dtype]) -> np.dtype:
    # float32 holds bfloat16 and float16 exactly.
    if len(types) == 1:
        return next(iter(types))
    return np.dtype(np.float64) if any(t.itemsize == 8 for t in types) else DTYPES["float32"]


def _pieces(row: Row, tensor: LazyTensor, dtype: np.dtype, own: str, findings: Findings) -> Iterator[np.ndarray]:
    """One official tensor as part of its parameter: a layer of a stack, or the whole in pieces of rows."""
    array = tensor.read()
    stays = not row.transform.unit_axes and row.transform.order == tuple(range(array.ndim))
    bad = False
    for part in row_pieces(array) if stays and row.layers is None else (array,):
        bad = bad or has_nonfinite(part)
        values = cast(part, dtype)
        if dtype.name == "float16" and not bad and values.dtype != part.dtype and has_nonfinite(values):
            raise UserError(f"--dtype float16: {own} has values beyond 65504; give --dtype bfloat16")
        values = contiguous(row.transform.forward(values))
        yield values if row.layers is None else values[np.newaxis]
    if bad:
        findings.nonfinite.append(own)
