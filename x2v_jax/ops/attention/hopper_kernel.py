"""The attention kernel for Hopper GPUs, in Pallas' Mosaic GPU dialect. `hopper.py` prepares what it takes.

A thread block has 64 queries of one head for each of its computing warpgroups, whose running maximum, sum and output
stay in registers (FlashAttention-3, arXiv 2407.08608); one more warpgroup fetches tiles of keys and values into a ring
in shared memory. A row of the tile table (`tiles.py`) says which tiles; only those that are cut are masked.

Softmax is in base 2. The factor of a score - softmax scale times log2(e), and for 8 bits the scales of query and block
of keys - is positive and the same for a whole row of a tile, so the maximum is taken before it and the product is part
of the multiply-add in front of the exponential: scales cost nothing.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from x2v_jax.ops.attention.hopper_config import HEAD_DIM, ROWS, SCALE_BLOCK, HopperConfig
from x2v_jax.ops.attention.hopper_products import (
    Refs,
    attention_scores,
    eight_bit_probabilities,
    plgpu,
    plus_values,
    plus_values_8bit,
)
from x2v_jax.ops.attention.quantized import PROBABILITY_BITS
from x2v_jax.ops.attention.tiles import CUT, CUTS, FIRST_FULL, FULL, SINK_FULL

_FULL_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number for each query
_FULL_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # a number for each channel

# The place of a row, a tile or a step; most are traced.
Index = Array | int
# Output, maximum and sum of a warpgroup's queries so far.
Carry = tuple[Array, Array, Array]
# Of queries and of values.
Scales = tuple[Array | None, Array | None]
# The carry at the end, and the scales of values.
Result = tuple[Array, Array, Array, Array | None]


class KernelInputs(NamedTuple):
    """Rows of keys and values lie in groups: a batch item's, or those of one layer's batch item in a cache of all.

    Attributes:
        q: bfloat16, float16, int8 or float8_e4m3fn.
        k: the same type. Rows behind the tiles' last key are never used, but read, so they must be finite.
        v: 16 bits, [G, T, H, D]; or float8_e4m3fn, transposed: [G, H, D, T], keys in `KEY_ORDER` for registers.
        tiles: a row for each thread block's queries, or one for all.
        first_group: batch item b attends to the keys of group first_group + b.
        q_scale: positive; with the softmax scale and log2(e). None: 16-bit inputs.
        k_scale: of 128 keys each.
        v_scale: of float8 values.
    """

    q: Num[Array, "b lq h d"]
    k: Num[Array, "g lk h d"]
    v: Num[Array, "g ..."]
    tiles: Int[Array, "n 16"]
    first_group: Int[Array, "1"]
    q_scale: Float[Array, "b h lq_padded"] | None = None
    k_scale: Float[Array, "g h blocks"] | None = None
    v_scale: Float[Array, "g h d"] | None = None


@dataclasses.dataclass(frozen=True)
class _Plan:
    config: HopperConfig
    factor: float  # of scores, where there is no q_scale
    out_dtype: DTypeLike
    with_log_sum_exp: bool
    one_table: bool
    transposed: bool  # 8-bit values


def hopper_attention_kernel(
    inputs: KernelInputs,
    *,
    factor: float,
    config: HopperConfig,
    out_dtype: DTypeLike,
    with_log_sum_exp: bool = False,
) -> tuple[Float[Array, "b lq h d"], Float[Array, "b h lq_padded"] | None]:
    """(attention, natural logarithm of the sum of exponentials of scores or None).

    factor: softmax scale times log2(e); not used with q_scale, which holds it.
    """
    b, lq, h, d = inputs.q.shape
    blocks = -(-lq // config.rows)
    plan = _Plan(config, factor, out_dtype, with_log_sum_exp, inputs.tiles.shape[0] == 1, inputs.v_scale is not None)
    names = [name for name, x in zip(KernelInputs._fields, inputs, strict=True) if x is not None]
    out_type = {"out": jax.ShapeDtypeStruct((b, lq, h, d), out_dtype)}
    if with_log_sum_exp:
        out_type["log_sum_exp"] = jax.ShapeDtypeStruct((b, h, blocks * config.rows), jnp.float32)

    def entry(*refs: jax.Ref) -> None:
        inputs_gmem, outputs = refs[: len(names)], refs[len(names) :]
        gmem = dict(zip([*names, *out_type], [*inputs_gmem, *outputs], strict=True))
        scoped = functools.partial(_thread_block, plan, gmem)
        pl.run_scoped(scoped, _scratch(plan, inputs), collective_axes="warpgroup")

    kernel = plgpu.kernel(
        entry,
        out_type=list(out_type.values()),
        grid=(b, h, blocks),
        grid_names=("batch", "head", "block"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out, *rest = kernel(*(getattr(inputs, name) for name in names))
    return out, rest[0] if rest else None


def _scratch(plan: _Plan, inputs: KernelInputs) -> dict[str, object]:
    config, q, k, v = plan.config, inputs.q, inputs.k, inputs.v
    groups, stages, keys = config.warpgroups, config.stages, config.block_kv
    value_tile = (HEAD_DIM, keys) if plan.transposed else (keys, HEAD_DIM)
    vectors = (inputs.q_scale is not None) + (inputs.v_scale is not None)
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    scratch: dict[str, object] = {
        "q": _tile((groups, ROWS, HEAD_DIM), q.dtype),
        "k": _tile((stages, keys, HEAD_DIM), k.dtype),
        "v": _tile((stages, *value_tile), v.dtype),
        "out": _tile((groups, ROWS, HEAD_DIM), plan.out_dtype),
        "q_ready": plgpu.Barrier(num_arrivals=1 + vectors, num_barriers=groups),
        "k_ready": ring(),
        "v_ready": ring(),
        "k_used": ring(num_arrivals=groups),
        "v_used": ring(num_arrivals=groups),
    }
    if config.takes_turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=groups)
    if plan.transposed and config.probabilities == "shared":
        scratch["p"] = _tile((groups, ROWS, keys), v.dtype)
    if inputs.q_scale is not None:
        scratch["q_scale"] = plgpu.SMEM((groups, ROWS), jnp.float32)
    if inputs.v_scale is not None:
        scratch["v_scale"] = plgpu.SMEM((groups, HEAD_DIM), jnp.float32)
    if plan.with_log_sum_exp:
        scratch["log_sum_exp"] = plgpu.SMEM((groups, ROWS), jnp.float32)
    return scratch


def _tile(shape: tuple[int, ...], dtype: DTypeLike) -> object:
    """Shared memory in the layout that a wgmma reads."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    )


class _Place(NamedTuple):
    """Where a thread block is in its inputs, and its row of the table."""

    batch: Array
    group: Array
    head: Array
    block: Array
    row: Index


def _thread_block(plan: _Plan, gmem: Refs, smem: Refs) -> None:
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    place = _Place(batch, gmem["first_group"][0] + batch, head, block, 0 if plan.one_table else block)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.config.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(plan.config.registers[0], action="increase")
        _compute(plan, gmem, smem, place, warpgroup)

    @pl.when(warpgroup == plan.config.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(plan.config.registers[1], action="decrease")
        _load(plan, gmem, smem, place)


def _tile_number(tiles: jax.Ref, row: Index, i: Index) -> Array:
    """The i-th tile that counts as a whole: those of the sink, then those behind."""
    in_sink = tiles[row, SINK_FULL]
    return jnp.where(i < in_sink, i, tiles[row, FIRST_FULL] + i - in_sink)


def _load(plan: _Plan, gmem: Refs, smem: Refs, place: _Place) -> None:
    stages, keys = plan.config.stages, plan.config.block_kv
    tiles, row, group, head = gmem["tiles"], place.row, place.group, place.head
    full = tiles[row, FULL]
    count = full + tiles[row, CUT]

    def fetch(i: Index, tile: Index) -> None:
        slot = lax.rem(i, stages)
        rows = pl.ds(tile * keys, keys)
        values = gmem["v"].at[group, head, :, rows] if plan.transposed else gmem["v"].at[group, rows, head]
        parts = (("k", gmem["k"].at[group, rows, head]), ("v", values))
        for name, source in parts:

            @pl.when(i >= stages)
            def _(name: str = name) -> None:
                plgpu.barrier_wait(smem[f"{name}_used"].at[slot])

            plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem[f"{name}_ready"].at[slot])

    pl.loop(0, full)(lambda i: fetch(i, _tile_number(tiles, row, i)))
    pl.loop(full, count)(lambda i: fetch(i, tiles[row, CUTS + 3 * (i - full)]))

    # Every use is waited for, also the last ones, so that no barrier is left in the middle of a phase.
    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(i: Index) -> None:
        plgpu.barrier_wait(smem["k_used"].at[lax.rem(i, stages)])
        plgpu.barrier_wait(smem["v_used"].at[lax.rem(i, stages)])


def _compute(plan: _Plan, gmem: Refs, smem: Refs, place: _Place, warpgroup: Array) -> None:
    config, tiles, row = plan.config, gmem["tiles"], place.row
    base = (place.block * config.warpgroups + warpgroup) * ROWS
    full = tiles[row, FULL]

    def give_turn() -> None:
        if config.takes_turns:
            plgpu.barrier_arrive(smem["turn"])

    def take_turn() -> None:
        if config.takes_turns:
            plgpu.barrier_wait(smem["turn"])

    def change_turns() -> None:
        give_turn()
        take_turn()

    q_scale, v_scale = _fetch_queries(gmem, smem, place, warpgroup, base)
    pl.when(warpgroup == 1)(change_turns)

    def step(i: Index, tile: Index, limits: tuple[Array, Array] | None, carry: Carry) -> Carry:
        out, top, total = carry
        slot = lax.rem(i, config.stages)
        # Read before the product, so that it arrives behind it.
        factor: float | Array = plan.factor
        if q_scale is not None:
            factor = q_scale * gmem["k_scale"][place.group, place.head, lax.div(tile * config.block_kv, SCALE_BLOCK)]
        scores = attention_scores(smem, warpgroup, slot, config.block_kv, change_turns)
        if limits is not None:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + tile * config.block_kv
            scores = jnp.where((key >= limits[0]) & (key < limits[1]), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        decay = jnp.exp2(top - new_top)
        shift = new_top - PROBABILITY_BITS if plan.transposed else new_top
        factor = factor if isinstance(factor, float) else lax.broadcast_in_dim(factor, scores.shape, [0])
        p = jnp.exp2(scores * factor - lax.broadcast_in_dim(shift, scores.shape, [0]))
        total = total * decay + p.sum(axis=1)
        decay = lax.broadcast_in_dim(decay, out.shape, [0])
        if plan.transposed:
            # There is no barrier for 8-bit arrays.
            total, new_top, p = lax.optimization_barrier((total, new_top, p))
            p = eight_bit_probabilities(config, smem, warpgroup, p)
        else:
            p = p.astype(smem["v"].dtype)
            out, total, new_top, p = lax.optimization_barrier((out * decay, total, new_top, p))
        give_turn()
        plgpu.barrier_wait(smem["v_ready"].at[slot])
        take_turn()
        values = smem["v"].at[slot]
        out = plus_values_8bit(out, decay, p, values.T) if plan.transposed else plus_values(out, p, values)
        plgpu.barrier_arrive(smem["v_used"].at[slot])
        return out, new_top, total

    def cut_step(i: Index, carry: Carry) -> Carry:
        tile, first, stop = (tiles[row, CUTS + 3 * (i - full) + column] for column in range(3))
        return step(i, tile, (first, stop), carry)

    column = jnp.zeros((ROWS,), jnp.float32)
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, HEAD_DIM), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(column - jnp.inf, _FULL_ROWS),
        plgpu.layout_cast(column, _FULL_ROWS),
    )
    carry = lax.fori_loop(0, full, lambda i, carry: step(i, _tile_number(tiles, row, i), None, carry), carry)
    out, top, total = lax.fori_loop(full, full + tiles[row, CUT], cut_step, carry)
    pl.when(warpgroup == 0)(change_turns)
    _store(plan, gmem, smem, place, warpgroup, base, (out, top, total, v_scale))


def _fetch_queries(
    gmem: Refs, smem: Refs, place: _Place, warpgroup: Array, base: Array
) -> tuple[Array | None, Array | None]:
    """Brings queries into shared memory; (their scales, the scales of values), each None where there are none."""
    ready = smem["q_ready"].at[warpgroup]
    rows = pl.ds(base, ROWS)
    plgpu.copy_gmem_to_smem(gmem["q"].at[place.batch, rows, place.head], smem["q"].at[warpgroup], ready)
    if "q_scale" in gmem:
        source = gmem["q_scale"].at[place.batch, place.head, rows]
        plgpu.copy_gmem_to_smem(source, smem["q_scale"].at[warpgroup], ready)
    if "v_scale" in gmem:
        source = gmem["v_scale"].at[place.group, place.head]
        plgpu.copy_gmem_to_smem(source, smem["v_scale"].at[warpgroup], ready)
    plgpu.barrier_wait(ready)
    q_scale = plgpu.load(smem["q_scale"].at[warpgroup], layout=_FULL_ROWS) if "q_scale" in gmem else None
    v_scale = plgpu.load(smem["v_scale"].at[warpgroup], layout=_FULL_COLUMNS) if "v_scale" in gmem else None
    return q_scale, v_scale


def _store(
    plan: _Plan,
    gmem: Refs,
    smem: Refs,
    place: _Place,
    warpgroup: Array,
    base: Array,
    result: Result,
) -> None:
    out, top, total, v_scale = result
    rows = pl.ds(base, ROWS)
    out = out * lax.broadcast_in_dim(1.0 / total, out.shape, [0])
    if v_scale is not None:
        out = out * lax.broadcast_in_dim(v_scale, out.shape, [1])
    smem["out"][warpgroup] = out.astype(plan.out_dtype)
    if plan.with_log_sum_exp:
        bits = PROBABILITY_BITS if plan.transposed else 0
        smem["log_sum_exp"][warpgroup] = (top - bits) * math.log(2) + jnp.log(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["out"].at[warpgroup], gmem["out"].at[place.batch, rows, place.head])
    if plan.with_log_sum_exp:
        target = gmem["log_sum_exp"].at[place.batch, place.head, rows]
        plgpu.copy_smem_to_gmem(smem["log_sum_exp"].at[warpgroup], target)
    plgpu.wait_smem_to_gmem(0)
