"""Turns official tensors into pieces of parameters: checked, converted to a type, a layer at a time.

Floats are transposed to ours; matrices that are or become 8-bit keep their axes and are followed by their scales.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.arrays import cast, contiguous, has_nonfinite, row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor, Streamed
from x2v_jax.checkpoint.names.wan import Row, same, table
from x2v_jax.checkpoint.published.open import PublishedNetwork
from x2v_jax.checkpoint.published.read import OfficialTensors
from x2v_jax.checkpoint.quantize.eight_bit import DTYPES as EIGHT_BIT_DTYPES
from x2v_jax.checkpoint.quantize.eight_bit import NO_FACTORS, quantize
from x2v_jax.checkpoint.quantize.smoothing import Smoother
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
    one: PublishedNetwork,
    tensors: Mapping[str, LazyTensor],
    dtype: str,
    quantization: str | None,
    findings: Findings,
    smoother: Smoother | None = None,
) -> tuple[dict[str, Streamed], int]:
    """The parameters of a component as streams, which must be read in the order given: scales come of their weights.

    Args:
        one: where the tensors come from, for messages and for which of them were 8-bit.
        tensors: official key -> tensor, LoRAs merged.
        dtype: "keep" or a name of DTYPES, of what is not 8-bit in the result. Kept, 8-bit weights that are multiplied
            out become bfloat16, and where the layers of a parameter differ in type, it becomes float32.
        quantization: the 8-bit type of the blocks' matrices, None for floats.
        smoother: of the floats that become 8-bit. The biases and the norm that take its factors become float32.

    Returns:
        Parameter name -> stream, and the number of parameters whose layers differ in type.
    """
    found = one.found
    streams: dict[str, Streamed] = {}
    scales: set[str] = set()
    mixed = 0
    for row in table(one.source.component, one.config):
        if quantization is not None and row.is_quantizable:
            matrices = _Matrices(row, found, tensors, quantization, findings, smoother)
            streams |= matrices.streams()
            scales.add(matrices.scale_row.native)
            continue
        if smoother is not None and smoother.takes(row):
            streams[row.native] = _folded(row, found, tensors, smoother, findings)
            continue
        types = {DTYPES["bfloat16"] if key in found.quantized else tensors[key].dtype for key in row.official_keys}
        mixed += len(types) > 1
        target = _common(types) if dtype == "keep" else DTYPES[dtype]

        def pieces(row: Row = row, target: np.dtype = target) -> Iterator[np.ndarray]:
            for key in row.official_keys:
                yield from _pieces(row, tensors[key], target, _own(found, key), findings)

        streams[row.native] = Streamed(row.native_shape, target, pieces)
    if smoother is not None:
        streams |= smoother.streams()
    order = sorted(streams, key=lambda n: n.removesuffix("scale") + "weight_scale" if n in scales else n)
    return {name: streams[name] for name in order}, mixed if dtype == "keep" else 0


class _Matrices:
    """One parameter's matrices on their way to 8 bits, or kept in them. Each is read once, for weight and scales."""

    def __init__(
        self,
        row: Row,
        found: OfficialTensors,
        tensors: Mapping[str, LazyTensor],
        quantization: str,
        findings: Findings,
        smoother: Smoother | None,
    ):
        self.row = row
        self._smoother = smoother
        self.weight_row, self.scale_row = row.quantized()
        self._found, self._tensors, self._findings = found, tensors, findings
        self._quantization = quantization
        self._scales: list[np.ndarray] = []

    def streams(self) -> dict[str, Streamed]:
        dtype = EIGHT_BIT_DTYPES[self._quantization]
        return {
            self.weight_row.native: Streamed(self.weight_row.native_shape, dtype, self._weights),
            self.scale_row.native: Streamed(self.scale_row.native_shape, DTYPES["float32"], lambda: self._scales),
        }

    def _weights(self) -> Iterator[np.ndarray]:
        self._scales.clear()
        for layer, key in enumerate(self.row.official_keys):
            values, scale = self._layer(layer, key)
            self._scales.append(scale[np.newaxis])
            yield values[np.newaxis]

    def _layer(self, layer: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        own = _own(self._found, key)
        stored = self._found.kept.get(key)
        if stored is None or self._tensors[key] is not self._found.tensors[key]:  # floats, or changed by a LoRA
            factors = NO_FACTORS if self._smoother is None else self._smoother.matrix(self.row, layer)
            return quantize(self._tensors[key].read(), self._quantization, own, factors)
        values, scale = stored.values.read(), stored.scale.read()
        if has_nonfinite(values) or has_nonfinite(scale):
            self._findings.nonfinite.append(own)
        return contiguous(values), scale


def _folded(
    row: Row, found: OfficialTensors, tensors: Mapping[str, LazyTensor], smoother: Smoother, findings: Findings
) -> Streamed:
    """A bias or a norm's parameter, times the inverse of the factors behind it."""

    def pieces() -> Iterator[np.ndarray]:
        for layer, key in enumerate(row.official_keys):
            for values in _pieces(row, tensors[key], DTYPES["float32"], _own(found, key), findings):
                yield values * smoother.vector(row, layer)

    return Streamed(row.native_shape, DTYPES["float32"], pieces)


def _own(found: OfficialTensors, key: str) -> str:
    return " + ".join(found.origin.get(key, (key,)))


def _common(types: set[np.dtype]) -> np.dtype:
    # float32 holds bfloat16 and float16 exactly.
    if len(types) == 1:
        return next(iter(types))
    return np.dtype(np.float64) if any(t.itemsize == 8 for t in types) else DTYPES["float32"]


def _pieces(row: Row, tensor: LazyTensor, dtype: np.dtype, own: str, findings: Findings) -> Iterator[np.ndarray]:
    """One official tensor as part of its parameter: a layer of a stack, or the whole in pieces of rows."""
    array = tensor.read()
    stays = row.transform == same(array.ndim)
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
