"""LoRA files merged into a transformer's weights."""

from typing import Any

import numpy as np

from tests.reference.cases_lib.case import Case
from tests.reference.cases_lib.weights import to_native
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into, merge_into_native
from x2v_jax.checkpoint.names import wan
from x2v_jax.models.config import WanConfig


def lora(case: Case) -> dict[str, Any]:
    """The changed weights by official names, merged in the native layout as loading a checkpoint with a LoRA does.

    Raises:
        ValueError: a weight changed that was not recorded as changed, or merging by official names, as the converter
            does, gives other numbers.
    """
    loras = [(LoraFile.open(case.inputs_path), float(case.config["strength"]))]
    official, _ = merge_into({key: _lazy(array) for key, array in case.weights.items()}, loras)
    rows = wan.table("transformer", WanConfig.from_dict(case.config))
    native, _ = merge_into_native({row.native: _lazy(to_native(row, case.weights)) for row in rows}, loras, rows)
    merged = {}
    for row in rows:
        array = native[row.native].read()
        for layer, key in enumerate(row.official_keys):
            merged[key] = row.transform.backward(array if row.layers is None else array[layer])
    for key, weight in case.weights.items():
        if not np.allclose(merged[key], official[key].read(), rtol=1e-6, atol=1e-7):
            raise ValueError(f"{case.path}: {key} differs between merging by official and by native names")
        if key not in case.outputs and not np.array_equal(merged[key], weight):
            raise ValueError(f"{case.path}: {key} was changed and should not be")
    return merged


def _lazy(array: np.ndarray) -> LazyTensor:
    return LazyTensor(array.shape, array.dtype, lambda: array)
