"""8-bit probabilities from the registers of one product into those of the next, without a move between threads.

The result of a wgmma leaves a thread with the columns 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16, t = 0..3; as an 8-bit
operand of the next it needs the columns 4t to 4t + 3 (PTX ISA, wgmma register fragments). A sum over keys does not ask
for their order: the probabilities are taken as they lie, and the rows of values are written in the same order.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu


def repack(p: Any) -> Any:
    """[64, n] float8_e4m3fn as a wgmma leaves it -> an operand whose columns are those of p in `KEY_ORDER`."""
    target = plgpu.ShapeDtypeStruct(p.shape, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=target)(repack_registers)(p)


def repack_registers(context: Any, p: Any) -> Any:
    """Puts the registers of two neighbouring groups of eight columns into one of four numbers."""
    del context
    layout = mgpu.WGMMA_LAYOUT_8BIT
    registers = np.empty(layout.registers_shape(p.shape), dtype=object)
    for index in np.ndindex(registers.shape):
        rows, columns, *rest = index
        pair = [p.registers[(rows, 2 * columns + half, *rest)] for half in range(2)]
        registers[index] = mgpu_utils.vector_concat(pair)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
