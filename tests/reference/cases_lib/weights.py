"""Weights by official names -> arrays of the parameter tree, by the rows of the converter's table."""

from collections.abc import Mapping

import numpy as np

from x2v_jax.checkpoint.names.wan import Row


def to_native(row: Row, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of one row: turned to our axes, its layers stacked."""
    layers = [row.transform.forward(weights[key]) for key in row.official_keys]
    return layers[0] if row.layers is None else np.stack(layers)
