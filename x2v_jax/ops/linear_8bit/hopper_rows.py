"""Rows quantized by Mosaic GPU kernels: a block a row, which is read once; only the 8-bit result is written.

A row is split over the warpgroups of its block so that it stays in registers. Partial sums meet in shared memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.ops.linear_8bit.choose import proved
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, quantize_rows_reference, round_to, row_scales

plgpu: Any = mosaic_gpu  # its annotations lag behind it

_THREADS = 128  # a warpgroup
_MOST_PER_THREAD = 36
_MOST_WARPGROUPS = 6
_LEAST_WIDTH, _LEAST_ROWS = 1024, 128
# Of values and scales to the reference's. Another order of summation flips a few roundings by one step.
ALLOWED_ERROR = 0.003


def warpgroups(width: int) -> tuple[int, int]:
    """(warpgroups a row, neighbouring elements a thread) for rows of `width`; (0, 0) if the kernels do not take it."""
    best = (0, 0)
    for number in range(1, _MOST_WARPGROUPS + 1):
        per_thread, rest = divmod(width, _THREADS * number)
        vector = next((v for v in (4, 2, 1) if per_thread % v == 0), 0)
        if not rest and 0 < per_thread <= _MOST_PER_THREAD and vector > best[1]:
            best = (number, vector)
    return best


def quantize_rows_hopper(
    x: Float[Array, "*b k"], dtype: DTypeLike, plus: Float[Array, "*b k"] | None = None
) -> QuantizedRows:
    """`quantize_rows` that reads x, and what is added to it, once."""
    width = x.shape[-1]
    inputs = [array.reshape(-1, width) for array in (x, plus) if array is not None]

    def summed(row: Array, *parts: Callable[..., Array]) -> Array:
        *loaders, _ = parts
        return functools.reduce(jnp.add, [load(row).astype(jnp.float32) for load in loaders])

    values, scales = quantize_each_row(summed, inputs, inputs[0].shape[0], width, dtype)
    return QuantizedRows(values.reshape(x.shape), scales.reshape(x.shape[:-1]))


def quantize_each_row(
    compute: Callable[..., Array], inputs: list[Array], number: int, width: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """compute(row, *loaders, total) -> this warpgroup's part of a row, float32; quantized by the row's absmax.

    A loader gives this warpgroup's part of a row of one input; total(jnp.sum | jnp.max, part, i) combines the parts of
    all warpgroups, i = 0, 1 for the first and second use.
    """
    groups, vector = warpgroups(width)
    part = width // groups
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=vector)

    def kernel(*refs: jax.Ref) -> None:
        *sources, values_out, scales_out, partial, met = refs
        wg, row = lax.axis_index("wg"), lax.axis_index("row")
        mine = pl.ds(wg * part, part)

        def loader(ref: jax.Ref) -> Callable[[Array | int], Array]:
            return lambda row: plgpu.load(ref.at[row, mine], layout=layout)

        def total(reduce: Callable[[Array], Array], values: Array, use: int) -> Array:
            result = reduce(values)
            if groups == 1:
                return result
            partial[use, wg] = result
            plgpu.barrier_arrive(met.at[use])
            plgpu.barrier_wait(met.at[use])
            combine = jnp.maximum if reduce is jnp.max else jnp.add
            return functools.reduce(combine, [partial[use, i] for i in range(groups)])

        values = compute(row, *map(loader, sources), total)
        scale, inverse = row_scales(total(jnp.max, jnp.abs(values), 2), dtype)
        values_out[row, mine] = round_to(values * inverse, dtype)

        @pl.when(wg == 0)
        def _() -> None:
            scales_out[row] = scale

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((number, width), dtype), jax.ShapeDtypeStruct((number,), jnp.float32)),
        scratch_types=(
            plgpu.SMEM((3, max(groups, 2)), jnp.float32),
            plgpu.Barrier(num_arrivals=groups, num_barriers=3),
        ),
        grid=(number,),
        grid_names=("row",),
        num_threads=groups,
        thread_name="wg",
    )(*inputs)


def rows_hopper_works(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether `quantize_rows_hopper` takes rows of this shape, and has proved itself on this device."""
    return takes_rows(shape) and proved(
        "quantization of rows",
        jnp.dtype(dtype).name,
        lambda: _of_one_and_of_a_sum(quantize_rows_hopper, dtype),
        lambda: _of_one_and_of_a_sum(quantize_rows_reference, dtype),
        allowed=ALLOWED_ERROR,
    )


def takes_rows(shape: tuple[int, ...]) -> bool:
    """Whether the kernels of rows take this shape: whole vectors a thread, and enough rows to be worth a kernel."""
    return warpgroups(shape[-1]) != (0, 0) and shape[-1] >= _LEAST_WIDTH and math.prod(shape[:-1]) >= _LEAST_ROWS


def _probe(seed: int = 0) -> Array:
    return jax.random.normal(jax.random.key(seed), (160, 5120), jnp.bfloat16)


def _of_one_and_of_a_sum(quantize: Callable[..., QuantizedRows], dtype: DTypeLike) -> list[Array]:
    """Values and scales of both: they are two kernels."""
    both = quantize(_probe(), dtype), quantize(_probe(), dtype, _probe(1))
    return [array for rows in both for array in (rows.values, rows.scale)]
