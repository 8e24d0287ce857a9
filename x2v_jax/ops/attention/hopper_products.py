"""The two products of the Hopper kernel: queries with keys, and probabilities with values.

8-bit probabilities go from the registers of one into those of the other without a move between threads. The
result of a wgmma leaves a thread with the columns 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16, t = 0..3; as an 8-bit
operand of the next it needs the columns 4t to 4t + 3 (PTX ISA, wgmma register fragments). A sum over keys does not ask
for their order: the probabilities are taken as they lie, and the rows of values are written in the same order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from x2v_jax.ops.attention.hopper_config import HEAD_DIM, ROWS, HopperConfig

# Untyped: what it exports and what its annotations say do not agree.
plgpu: Any = mosaic_gpu


# What lies in memory, by name: arrays, and the barriers that say when they are there. `jax.Ref`, or a view of one in
# another layout, whose type jax does not export.
Refs = dict[str, Any]


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


def attention_scores(smem: Refs, warpgroup: Array, slot: Array, keys: int, change_turns: Callable[[], None]) -> Array:
    """Of a warpgroup's queries with the keys in a slot of the ring, float32."""
    plgpu.barrier_wait(smem["k_ready"].at[slot])

    def product(accumulator: jax.Ref) -> Array:
        plgpu.wgmma(accumulator, smem["q"].at[warpgroup], smem["k"].at[slot].T)
        change_turns()
        return accumulator[...]

    dtype = jnp.int32 if smem["q"].dtype == jnp.int8 else jnp.float32
    scores = pl.run_scoped(product, plgpu.ACC((ROWS, keys), dtype))
    plgpu.barrier_arrive(smem["k_used"].at[slot])
    return scores.astype(jnp.float32)


def eight_bit_probabilities(config: HopperConfig, smem: Refs, warpgroup: Array, p: Array) -> object:
    """What is multiplied with values: in registers, or in shared memory."""
    p = p.astype(smem["v"].dtype)
    if config.probabilities == "registers":
        return repack(p)
    smem["p"][warpgroup] = p
    plgpu.commit_smem()
    return smem["p"].at[warpgroup]


def plus_values(out: Array, p: object, values: object) -> Array:
    return pl.run_state(lambda total: plgpu.wgmma(total, p, values))(plgpu.ACC.init(out))


def plus_values_8bit(out: Array, decay: Array, p: object, values: object) -> Array:
    """Each tile in an accumulator of its own: 8-bit products add up with fewer bits than float32 has."""

    def product(accumulator: jax.Ref) -> Array:
        plgpu.wgmma(accumulator, p, values)
        return accumulator[...]

    return out * decay + pl.run_scoped(product, plgpu.ACC((ROWS, HEAD_DIM), jnp.float32))
