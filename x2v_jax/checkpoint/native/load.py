"""Weights from their files onto devices: one tensor at a time, cast on the host, to each device its own part."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from x2v_jax.checkpoint.files.arrays import cast
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor

if TYPE_CHECKING:
    import jax


def load_tensors(tensors: Mapping[str, LazyTensor], targets: "Mapping[str, jax.ShapeDtypeStruct]") -> dict[str, Any]:
    """The tensors as arrays on devices, in a nested dict by the parts of their names.

    Args:
        tensors: by flat name.
        targets: of each its type on the device and its sharding, of which each process reads only the slices that its
            devices hold; without one it goes to the first device, uncommitted, as what is computed there is.
    """
    import jax

    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        target = targets[name]
        values, dtype = tensor.read(), np.dtype(target.dtype)
        # Cast on the host, so that no device holds a weight twice; waited for, so that the host holds one at a time.
        if target.sharding is None:
            node[leaf] = jax.device_put(np.ascontiguousarray(cast(values, dtype))).block_until_ready()
            continue
        node[leaf] = jax.make_array_from_callback(
            tensor.shape,
            target.sharding,
            lambda index, values=values, dtype=dtype: np.ascontiguousarray(cast(values[index], dtype)),
        ).block_until_ready()
    return tree
