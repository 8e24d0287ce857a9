"""Many devices: meshes and the rules by which trees of arrays are laid out on them.

One axis of devices, "fsdp": each holds a part of every large array and of every batch. Weights are gathered where they
are used, a layer at a time, because the stacked layers are scanned and never split over devices; gradients are summed
and scattered back. XLA does both from the shardings alone (Rajbhandari et al., arXiv:1910.02054, stage 3; Xu et al.,
arXiv:2105.04663).
"""

import dataclasses
from typing import Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from x2v_jax.errors import UserError

AXIS = "fsdp"
# Below this many elements an array is cheaper to keep whole than to gather.
_MIN_SIZE = 2**14


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices of a run, of all processes."""

    devices: jax.sharding.Mesh

    @classmethod
    def of(cls, count: int | None = None) -> Self:
        """The first `count` devices; None for all.

        Raises:
            UserError: there are not so many.
        """
        available = jax.devices()
        count = len(available) if count is None else count
        if not 0 < count <= len(available):
            raise UserError(f"devices is {count}; this machine has {len(available)}, so give 1 to {len(available)}")
        return cls(jax.sharding.Mesh(np.array(available[:count]), (AXIS,)))

    @property
    def size(self) -> int:
        return self.devices.size

    def sharding(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(self.devices, PartitionSpec(*spec))

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises UserError unless a batch splits evenly over the devices, in each of its `accumulate` parts."""
        if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * self.size):
            step = max(1, accumulate) * self.size
            raise UserError(
                f"batch_size is {batch_size}; on {self.size} device(s) with accumulate {accumulate} it has to be a "
                f"multiple of {step}: give {max(1, round(batch_size / step)) * step}"
            )


def spec_of(shape: tuple[int, ...], devices: int, min_size: int = _MIN_SIZE) -> PartitionSpec:
    """How an array is laid out: its longest axis that splits evenly over the devices is split.

    The first axis of an array of three or more is spared: stacked layers are scanned along it.
    """
    axes = range(1, len(shape)) if len(shape) >= 3 else range(len(shape))
    fitting = [axis for axis in axes if shape[axis] % devices == 0]
    if devices == 1 or not fitting or np.prod(shape) < min_size:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == longest else None for axis in range(longest + 1)))


def tree_shardings(tree: object, mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every leaf. Parameters, the state of their optimizer and their average follow one rule."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh.devices, spec_of(leaf.shape, mesh.size)), tree)


def place_tree(tree: object, mesh: Mesh) -> PyTree[Array]:
    """Puts a tree of arrays on the devices by `tree_shardings`."""
    return jax.device_put(tree, tree_shardings(tree, mesh))


def place_batch(batch: object, mesh: Mesh) -> PyTree[Array]:
    """Splits every leaf of a batch along its first axis over the devices. With many processes each has read the whole
    batch and puts the part of its own devices there."""
    sharding = mesh.sharding(AXIS)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), batch
    )
