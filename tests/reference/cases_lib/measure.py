"""Runs a case and compares every output that was recorded."""

import dataclasses

import jax
import numpy as np
from numpy.typing import ArrayLike

from tests.reference.cases_lib.case import Case
from tests.reference.cases_lib.registry import KINDS, UnknownKind


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Error of one output of one case."""

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def relative_error(ours: ArrayLike, recorded: ArrayLike) -> float:
    """||ours - recorded|| / ||recorded|| over all elements, in float64; the plain norm where the record is zero."""
    a, b = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape} where {b.shape} was recorded")
    return float(np.linalg.norm((a - b).ravel()) / (np.linalg.norm(b.ravel()) or 1.0))


def measure(case: Case) -> list[Measurement]:
    """Computes the case in float32 and returns the error of each recorded output.

    Raises:
        UnknownKind: no function answers the case's kind.
        ValueError: an output is missing or has another shape.
    """
    if case.kind not in KINDS:
        raise UnknownKind(f"kind {case.kind!r} of {case.path}; known are {', '.join(sorted(KINDS))}")
    kind = KINDS[case.kind]
    with jax.default_matmul_precision("highest"):
        ours = kind.run(case)
    if missing := set(case.outputs) - set(ours):
        raise ValueError(f"kind {case.kind!r} does not compute {', '.join(sorted(missing))} of {case.path}")
    measurements = []
    for output, recorded in case.outputs.items():
        try:
            error = relative_error(ours[output], recorded)
        except ValueError as mismatch:
            raise ValueError(f"{case.path}: {output}: {mismatch}") from None
        measurements.append(Measurement(output, error, kind.tolerance))
    return measurements
