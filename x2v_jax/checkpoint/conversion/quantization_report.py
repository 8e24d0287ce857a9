"""What 8 bits did to each matrix: its error against the source, or what can be told without one."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from x2v_jax.checkpoint.conversion.compare import open_networks, source_tensors, variant_of
from x2v_jax.checkpoint.files.arrays import row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.quantize.eight_bit import LARGEST, NO_FACTORS, EightBit, dequantize
from x2v_jax.errors import UserError

# Beyond this share of a matrix, what differs is not the rounding: 8 bits leave 1 to 4 %, smoothed ones up to 20 %.
_SUSPICIOUS = 0.5


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """One 8-bit matrix.

    Attributes:
        component, key: which; the official key.
        dtype: "int8" or "float8_e4m3fn".
        smallest_scale, largest_scale: of its rows.
        smoothed: whether factors went into it before its 8 bits. Errors are of the weight without them, as it was.
        saturated, zeros: shares of the values that are the largest, and zero. A row's largest value always saturates.
        relative_error: root mean square of the error, over that of the source; None without a source.
        cosine: of the source and the multiplied-out matrix; None without a source.
    """

    component: str
    key: str
    dtype: str
    smallest_scale: float
    largest_scale: float
    saturated: float
    zeros: float
    smoothed: bool = False
    relative_error: float | None = None
    cosine: float | None = None

    @property
    def decibels(self) -> float | None:
        """Signal to quantization noise, from the relative error."""
        if self.relative_error is None:
            return None
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf

    def __str__(self) -> str:
        text = (
            f"{self.key} {self.dtype}: scale {self.smallest_scale:.2e} to {self.largest_scale:.2e}, "
            f"{self.saturated:.3%} saturated, {self.zeros:.2%} zero{', smoothed' if self.smoothed else ''}"
        )
        if self.relative_error is not None:
            text += f"; error {self.relative_error:.2%} ({self.decibels:.1f} dB), cosine {self.cosine:.6f}"
        return text


def quantization_report(path: str | pathlib.Path, against: str | pathlib.Path | None = None) -> Iterator[MatrixReport]:
    """Reads every 8-bit matrix of a checkpoint, one at a time.

    Args:
        path: a native checkpoint, or LightX2V's 8-bit files.
        against: the checkpoint, in any layout, that it was made of.

    Raises:
        UserError: there is no 8-bit matrix, or the source is of another task or other sizes, or does not have the same
            matrices as floats.
    """
    networks = {name: one for name, one in open_networks(path).items() if one.found.kept}
    if not networks:
        raise UserError(
            f"{path}: none of its matrices is 8-bit with scales by rows; there is no quantization to tell of"
        )
    sources = open_networks(against, variant_of(networks)) if against is not None else {}
    for component, one in networks.items():
        source = source_tensors(component, one, sources, against) if against is not None else {}
        for key, matrix in sorted(one.found.kept.items(), key=lambda item: _in_order(item[0])):
            yield _report(component, key, matrix, source.get(key))


def _in_order(key: str) -> list[tuple[int, str]]:
    """Block 10 comes after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def _report(component: str, key: str, matrix: EightBit, source: LazyTensor | None) -> MatrixReport:
    values, scale, undo = matrix.values.read(), matrix.scale.read(), matrix.undo()
    largest = LARGEST[matrix.quantization]
    saturated = zeros = 0
    sums = np.zeros(4)  # of error^2, source^2, restored^2, source * restored
    start = 0
    floats = None if source is None else source.read()
    for rows in row_pieces(values):
        part = slice(start, start + len(rows))
        start += len(rows)
        magnitudes = np.abs(rows.astype(np.float32))
        saturated += int((magnitudes >= largest).sum())
        zeros += int((magnitudes == 0).sum())
        if floats is not None:
            restored = dequantize(rows, scale[part])
            undo.apply(restored, part)
            sums += _sums(floats[part].astype(np.float32), restored)
    report = MatrixReport(
        component,
        key,
        matrix.quantization,
        float(scale.min(initial=math.inf)),
        float(scale.max(initial=0)),
        saturated / max(1, values.size),
        zeros / max(1, values.size),
        undo != NO_FACTORS,
    )
    if floats is None:
        return report
    error, exact, restored, both = (float(value) for value in sums)
    relative = math.sqrt(error / exact) if exact else 0.0 if not error else math.inf
    cosine = both / math.sqrt(exact * restored) if exact and restored else 1.0
    return dataclasses.replace(report, relative_error=relative, cosine=cosine)


def _sums(exact: np.ndarray, restored: np.ndarray) -> np.ndarray:
    pairs = ((exact - restored, exact - restored), (exact, exact), (restored, restored), (exact, restored))
    return np.array([np.vdot(a, b).astype(np.float64) for a, b in pairs])


def summary(reports: list[MatrixReport]) -> list[str]:
    """A line a component: how many matrices, and of their errors the usual and the worst. A note before it where they
    are another model's."""
    lines = []
    for component in dict.fromkeys(report.component for report in reports):
        own = [report for report in reports if report.component == component]
        line = f"{component}: {len(own)} matrices"
        errors = [(report.relative_error, report.key) for report in own if report.relative_error is not None]
        if errors:
            worst, key = max(errors)
            middle = np.median([error for error, _ in errors])
            line += f", relative error {middle:.2%} in the middle, {worst:.2%} at the most ({key})"
            if middle > _SUSPICIOUS:
                lines.append(
                    f"note: {component}: so much does not come of 8 bits; give with --against the very checkpoint that "
                    "this was made of"
                )
        lines.append(line)
    return lines
