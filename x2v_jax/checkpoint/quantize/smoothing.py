"""SmoothQuant: large channels of activations are made smaller, and the weights that read them larger, before 8 bits.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),    Y = (X / s) (s W)

X_j is an input's channel over all recorded tokens, W_j its column in all matrices that read the input. The product
stays the same; a token's few large channels no longer take the 8 bits of its others.
Source: Xiao et al., "SmoothQuant" (2022), arXiv:2211.10438, equation 4.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from x2v_jax.checkpoint.files.arrays import row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor, Streamed
from x2v_jax.checkpoint.names.smoothing import GROUP_OF_COLUMNS, GROUP_OF_ROWS, GROUPS, module_of
from x2v_jax.checkpoint.names.wan import Row
from x2v_jax.checkpoint.quantize.calibration import Calibration
from x2v_jax.checkpoint.quantize.eight_bit import Factors
from x2v_jax.errors import UserError, is_number

ALPHA = 0.5
# Channels this much smaller than the largest are as good as empty, and so is a column of weights.
_EMPTY = 1e-7
# The blocks add inverse - 1 to a scale that one is added to again: an inverse of 1/1000 is then exact to 6e-5, far
# below 8 bits, and one of 1e-5 would not be.
_SMALLEST, _LARGEST = 1e-3, 1e3

# Where the official name of a matrix in a block is not ours.
_OFFICIAL = {"ffn.linear_1": "ffn.0"}


def smoothing_factors(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """s [D], float32, between 1/1000 and 1000, their geometric mean about 1 (a common factor would change nothing).

    Args:
        activations: the largest magnitude of each channel [D].
        weights: the largest magnitude of each column [D], of all matrices that read the channels.
        alpha: 0 (weights become even) to 1 (activations do).

    >>> smoothing_factors(np.array([16.0, 1, 0]), np.array([1.0, 1, 1]), 0.5)
    array([2. , 0.5, 1. ], dtype=float32)
    """
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    used = (x > _EMPTY * x.max(initial=0)) & (w > _EMPTY * w.max(initial=0))
    logarithms = np.zeros(x.shape)
    logarithms[used] = alpha * np.log(x[used]) - (1 - alpha) * np.log(w[used])
    logarithms[used] -= logarithms[used].mean() if used.any() else 0
    return np.exp(logarithms).clip(_SMALLEST, _LARGEST).astype(np.float32)


def check_alpha(alpha: object) -> float:
    """
    Raises:
        UserError: it is no number from 0 to 1.
    """
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise UserError(f"--smooth-alpha is {alpha!r}; give a number from 0 to 1 (0.5 is usual)")
    return float(alpha)


class Smoother:
    """The factors of one transformer, each worked out when it is first needed, which reads its weights once more.

    Args:
        calibration: checked against the transformer.
        tensors: official key -> weight, floats, LoRAs merged. One is in memory at a time.
    """

    def __init__(self, calibration: Calibration, alpha: float, tensors: Mapping[str, LazyTensor]):
        self.alpha = alpha
        self._calibration, self._tensors = calibration, tensors
        self._inverses: dict[tuple[str, int], np.ndarray] = {}

    def matrix(self, row: Row, layer: int) -> Factors:
        """Of the matrix that the row has in this layer."""
        module = module_of(row.native)
        columns, rows = GROUP_OF_COLUMNS.get(module), GROUP_OF_ROWS.get(module)
        return Factors(
            None if columns is None else 1 / self.inverse(columns, layer),
            None if rows is None else self.inverse(rows, layer),
        )

    def takes(self, row: Row) -> bool:
        """Whether a row of the network's table is a bias, or of a norm, that `vector` goes into."""
        return not row.is_quantizable and module_of(row.native) in GROUP_OF_ROWS

    def vector(self, row: Row, layer: int) -> np.ndarray:
        """What a row that `takes` it is multiplied by in this layer [D]."""
        return self.inverse(GROUP_OF_ROWS[module_of(row.native)], layer)

    def inverse(self, group: str, layer: int) -> np.ndarray:
        """1 / s [D] of a layer, float32."""
        if (group, layer) not in self._inverses:
            activations = self._calibration.maxima[group][layer]
            weights = np.zeros(activations.shape, np.float32)
            for matrix in GROUPS[group].matrices:
                key = f"blocks.{layer}.{_OFFICIAL.get(matrix, matrix)}.weight"
                weights = np.maximum(weights, _largest_of_columns(self._tensors[key].read(), key))
            self._inverses[group, layer] = 1 / smoothing_factors(activations, weights, self.alpha)
        return self._inverses[group, layer]

    def streams(self) -> dict[str, Streamed]:
        """The parameters that hold the inverses."""

        def pieces(group: str) -> Iterator[np.ndarray]:
            for layer in range(len(self._calibration.maxima[group])):
                yield self.inverse(group, layer)[np.newaxis]

        return {
            group.stored: Streamed(
                self._calibration.maxima[name].shape, np.dtype(np.float32), lambda name=name: pieces(name)
            )
            for name, group in GROUPS.items()
        }


def _largest_of_columns(weight: np.ndarray, key: str) -> np.ndarray:
    largest = np.zeros(weight.shape[1], np.float32)
    for rows in row_pieces(weight):
        largest = np.maximum(largest, np.abs(rows.astype(np.float32)).max(0, initial=0))
    if not np.isfinite(largest).all():
        raise UserError(f"{key} holds NaN or infinity, which 8 bits cannot hold; download the file again")
    return largest
