"""A smoothed native transformer as it was before: factors undone in matrices, biases and norm3."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.names.smoothing import GROUP_OF_COLUMNS, GROUP_OF_ROWS, module_of
from x2v_jax.checkpoint.names.wan import table
from x2v_jax.checkpoint.published.read import OfficialTensors
from x2v_jax.checkpoint.quantize.eight_bit import EightBit, Factors


def without_smoothing(found: OfficialTensors, config: object, inverses: Mapping[str, LazyTensor]) -> OfficialTensors:
    """The tensors of a smoothed transformer, such that they read as those that were smoothed, up to rounding.

    Args:
        found: as the checkpoint has them; 8-bit matrices keep their values and scales, and know what undoes the rest.
        config: of the transformer.
        inverses: as `NativeCheckpoint.smoothing_inverses` gives them.
    """
    tensors, kept = dict(found.tensors), dict(found.kept)
    for row in table("transformer", config):
        module = module_of(row.native)
        columns, rows = GROUP_OF_COLUMNS.get(module), GROUP_OF_ROWS.get(module)
        for layer, key in enumerate(row.official_keys):
            if row.is_quantizable and (columns or rows):
                kept[key] = one = _undone(found.kept[key], inverses, columns, rows, layer)
                tensors[key] = LazyTensor(one.values.shape, np.dtype(np.float32), one.read)
            elif rows:
                tensors[key] = _unfolded(found.tensors[key], inverses[rows], layer)
    return dataclasses.replace(found, tensors=tensors, kept=kept)


def _undone(
    matrix: EightBit, inverses: Mapping[str, LazyTensor], columns: str | None, rows: str | None, layer: int
) -> EightBit:
    def undo() -> Factors:
        # Columns had been multiplied by s, rows by 1 / s.
        return Factors(
            None if columns is None else inverses[columns].read()[layer],
            None if rows is None else 1 / inverses[rows].read()[layer],
        )

    return dataclasses.replace(matrix, undo=undo)


def _unfolded(vector: LazyTensor, inverse: LazyTensor, layer: int) -> LazyTensor:
    return LazyTensor(
        vector.shape, np.dtype(np.float32), lambda: vector.read().astype(np.float32) / inverse.read()[layer]
    )
