"""W8A8 matmul for Hopper GPUs (sm_90a) in Mosaic GPU: persistent, warp-specialized, everything after the sum fused.

One block a streaming multiprocessor walks over output tiles of 128 rows. One warpgroup loads tiles of x and of the
weight into a ring in shared memory; two multiply 64 rows each and finish their part of the output: token and channel
scales, bias, GELU, or gate and residual. Rows past the end of x are zeros that TMA fills in and does not write back.

The blocks of a cluster work side by side, on the same columns: each loads a part of the weight's tile for all of them.
Alone, a block would need 1.5 times the bytes of the L2 cache for its products.

Not here: quantizing the result for the next matmul. Its per-token scale needs the largest of all N columns of a row
before the first of them can be rounded, and a block holds tile_n of them.
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

from x2v_jax.ops.linear_8bit.config import MatmulConfig, core_count
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows
from x2v_jax.ops.linear_8bit.reference import Activation

plgpu: Any = mosaic_gpu  # its annotations lag behind it

# What lies in memory, by name: arrays, and the barriers that say when they are there. `jax.Ref`, or a view of one in
# another layout, whose type jax does not export.
Refs = dict[str, Any]

_WARPGROUPS = 2
_ROWS = 64  # a warpgroup; what one wgmma takes
_BLOCK_ROWS = _WARPGROUPS * _ROWS
_LOADER = _WARPGROUPS
_LAYOUT = plgpu.Layout.WGMMA


def matmul_hopper(
    x: QuantizedRows,
    weight: Array,
    scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None,
    activation: Activation,
    gate: Float[Array, "#m n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype: DTypeLike,
    config: MatmulConfig,
    num_clusters: int | None = None,
) -> Float[Array, "m n"]:
    """`reference.matmul_8bit` in one kernel, where `choose_hopper.matmul_config` gives a config.

    Args:
        num_clusters: of persistent blocks; as many as give each streaming multiprocessor a block if None.
    """
    m, (n, k) = x.values.shape[0], weight.shape
    token_gate = gate is not None and gate.shape[0] > 1
    if n % config.tile_n or k % config.tile_k or (gate is not None and residual is None):
        raise ValueError(f"{config} does not fit x {x.values.shape}, weight {weight.shape}, or a gate has no residual")
    # Tiles of shared memory are groups of 8 rows, and TMA clips whole groups.
    rows = math.ceil(m / 8) * 8
    arrays = {
        "x": _pad_rows(x.values, rows),
        "w": weight,
        "x_scale": _pad_rows(x.scale, rows),
        "w_scale": scale,
        "bias": None if bias is None else bias.astype(jnp.float32),
        "channel_gate": None if gate is None or token_gate else gate.astype(jnp.float32).reshape(n),
        "token_gate": _pad_rows(gate.astype(jnp.float32), rows) if gate is not None and token_gate else None,
        "residual": None if residual is None else _pad_rows(residual, rows),
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    call = plgpu.kernel(
        functools.partial(_entry, names=tuple(arrays), activation=activation, config=config),
        out_type=jax.ShapeDtypeStruct((rows, n), out_dtype),
        grid=(num_clusters or core_count() // config.cluster,),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        # Only GELU's exponential and division are approximate: 2 units in the last place of float32.
        compiler_params=plgpu.CompilerParams(
            approx_math=activation is not None, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return call(*arrays.values())[:m]


def _pad_rows(x: Array, rows: int) -> Array:
    return x if x.shape[0] == rows else jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _tiled(width: int, dtype: DTypeLike) -> tuple[object, object]:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _entry(*refs: jax.Ref, names: tuple[str, ...], activation: Activation, config: MatmulConfig) -> None:
    gmem, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    dtype, c = gmem["x"].dtype, config
    ring = (c.stages,)
    smem = {
        "x": plgpu.SMEM((*ring, _BLOCK_ROWS, c.tile_k), dtype, transforms=_tiled(c.tile_k, dtype)),
        "w": plgpu.SMEM((*ring, c.tile_n, c.tile_k), dtype, transforms=_tiled(c.tile_k, dtype)),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
        "consumed": _consumed(c),
        "out": _epilogue_buffer(c, out.dtype),
        "x_scale": plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
    }
    vectors = [name for name in ("w_scale", "bias", "channel_gate") if name in gmem]
    for name in vectors:
        smem[name] = plgpu.SMEM((_WARPGROUPS, c.tile_n), jnp.float32)
    smem["vectors_loaded"] = plgpu.Barrier(num_arrivals=1 + len(vectors), num_barriers=_WARPGROUPS)
    if "token_gate" in gmem:
        smem["token_gate"] = _epilogue_buffer(c, jnp.float32)
    if "residual" in gmem:
        smem["tile_loaded"] = plgpu.Barrier(
            num_arrivals=1 + ("token_gate" in gmem), num_barriers=_WARPGROUPS * c.epilogue_slots
        )
    pl.run_scoped(lambda scratch: _block(gmem, out, scratch, activation, config), smem, collective_axes="wg")


def _consumed(config: MatmulConfig) -> object:
    """Arrivals say that a stage may be written again. Where peers write it too, they must hear of each."""
    counts = {"num_arrivals": _WARPGROUPS, "num_barriers": config.stages}
    return plgpu.Barrier(**counts) if config.cluster == 1 else plgpu.ClusterBarrier(collective_axes=("peer",), **counts)


def _epilogue_buffer(config: MatmulConfig, dtype: DTypeLike) -> object:
    shape = (_WARPGROUPS, config.epilogue_slots, _ROWS, config.epilogue_n)
    return plgpu.SMEM(shape, dtype, transforms=_tiled(config.epilogue_n, dtype))


def _block(gmem: Refs, out: jax.Ref, smem: Refs, activation: Activation, config: MatmulConfig) -> None:
    rows, n = out.shape
    steps = gmem["x"].shape[1] // config.tile_k
    grid = (pl.cdiv(rows, _BLOCK_ROWS * config.cluster), n // config.tile_n)
    wg, peer = lax.axis_index("wg"), lax.axis_index("peer")

    def each_tile(body: Callable[[Array, Array, Array], Array], carry: Array) -> Array:
        """body(first row, first column, carry) over this block's output tiles."""

        def one(info: mosaic_gpu.NDLoopInfo, carry: Array) -> Array:
            i, j = plgpu.planar_snake(info.index[0], grid, 1, config.snake)
            return body((i * config.cluster + peer) * _BLOCK_ROWS, j * config.tile_n, carry)

        return plgpu.nd_loop((math.prod(grid),), collective_axes="cluster", init_carry=carry)(one)

    @pl.when(wg < _LOADER)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")

        def tile(row: Array, column: Array, count: Array) -> Array:
            row = row + wg * _ROWS
            _load_vectors(gmem, smem, wg, row, column, config)
            _prefetch_residual(gmem, smem, wg, row, column, config)
            sums = _multiply(smem, wg, count, steps, config)
            _finish(gmem, smem, out, wg, row, column, sums, activation, config)
            return count + steps

        each_tile(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == _LOADER)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def tile(row: Array, column: Array, count: Array) -> Array:
            def load(step: Array, count: Array) -> Array:
                slot = lax.rem(count, config.stages)
                pl.when(count >= config.stages)(lambda: plgpu.barrier_wait(smem["consumed"].at[slot]))
                columns = pl.ds(step * config.tile_k, config.tile_k)
                shared = "peer" if config.cluster > 1 else None
                for name, first, size, axes in (("x", row, _BLOCK_ROWS, None), ("w", column, config.tile_n, shared)):
                    source = gmem[name].at[pl.ds(first, size), columns]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem["loaded"].at[slot], collective_axes=axes)
                return count + 1

            return lax.fori_loop(0, steps, load, count)

        count = each_tile(tile, jnp.int32(0))

        @pl.loop(lax.max(0, count - config.stages), count)
        def _(i: Array) -> None:  # Nobody may leave while the others, or a peer, still signal.
            plgpu.barrier_wait(smem["consumed"].at[lax.rem(i, config.stages)])


def _load_vectors(gmem: Refs, smem: Refs, wg: Array, row: Array, column: Array, config: MatmulConfig) -> None:
    barrier = smem["vectors_loaded"].at[wg]
    plgpu.copy_gmem_to_smem(gmem["x_scale"].at[pl.ds(row, _ROWS)], smem["x_scale"].at[wg], barrier)
    for name in ("w_scale", "bias", "channel_gate"):
        if name in gmem:
            plgpu.copy_gmem_to_smem(gmem[name].at[pl.ds(column, config.tile_n)], smem[name].at[wg], barrier)


def _multiply(smem: Refs, wg: Array, count: Array, steps: int, config: MatmulConfig) -> Array:
    """The 64 x tile_n sums of a warpgroup; `count` stages went through the ring before."""
    dtype = smem["x"].dtype
    sum_dtype = jnp.int32 if dtype == jnp.int8 else jnp.float32
    shape = (_ROWS, config.tile_n)
    mine = pl.ds(wg * _ROWS, _ROWS)

    def stages(first: int | Array, number: int) -> Array:
        def run(sums: jax.Ref) -> Array:
            def step(i: Array, _: None) -> None:
                slot = lax.rem(count + first + i, config.stages)
                plgpu.barrier_wait(smem["loaded"].at[slot])
                plgpu.wgmma(sums, smem["x"].at[slot, mine], smem["w"].at[slot].T)
                # One product stays in flight; the one before it has been read when this returns.
                plgpu.wgmma_wait(1)
                before = lax.rem(count + first + i + config.stages - 1, config.stages)
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(smem["consumed"].at[before]))

            lax.fori_loop(0, number, step, None)
            result = sums[...]
            plgpu.barrier_arrive(smem["consumed"].at[lax.rem(count + first + number - 1, config.stages)])
            return result

        return pl.run_scoped(run, plgpu.ACC(shape, sum_dtype))

    if not config.promote or dtype == jnp.int8:
        return stages(0, steps)
    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT)
    whole = steps // config.promote
    total = lax.fori_loop(0, whole, lambda i, t: t + stages(i * config.promote, config.promote), total)
    return total + stages(whole * config.promote, steps % config.promote) if steps % config.promote else total


def _finish(
    gmem: Refs,
    smem: Refs,
    out: jax.Ref,
    wg: Array,
    row: Array,
    column: Array,
    sums: Array,
    activation: Activation,
    config: MatmulConfig,
) -> None:
    """Scales and the rest of the epilogue, `epilogue_n` columns at a time, out through shared memory."""
    width, slots = config.epilogue_n, config.epilogue_slots
    tiles = config.tile_n // width
    plgpu.barrier_wait(smem["vectors_loaded"].at[wg])
    x_scale = plgpu.load(smem["x_scale"].at[wg], layout=_LAYOUT.reduce(1))
    for e in range(tiles):
        part, slot = slice(e * width, (e + 1) * width), e % slots
        y = sums[:, part].astype(jnp.float32)

        def channels(name: str, part: slice = part, shape: tuple[int, ...] = y.shape) -> Array:
            vector = plgpu.load(smem[name].at[wg, part], layout=_LAYOUT.reduce(0))
            return lax.broadcast_in_dim(vector, shape, [1])

        y = y * lax.broadcast_in_dim(x_scale, y.shape, [0]) * channels("w_scale")
        if "bias" in gmem:
            y = y + channels("bias")
        if activation == "gelu_tanh":
            y = _gelu(y)
        if "channel_gate" in gmem:
            y = y * channels("channel_gate")
        if "residual" in gmem:
            plgpu.barrier_wait(smem["tile_loaded"].at[wg * slots + slot])
            if "token_gate" in gmem:
                y = y * plgpu.load(smem["token_gate"].at[wg, slot], layout=_LAYOUT)
            y = y + plgpu.load(smem["out"].at[wg, slot], layout=_LAYOUT)
        else:
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        smem["out"][wg, slot] = y.astype(out.dtype)
        plgpu.commit_smem()
        target = out.at[pl.ds(row, _ROWS), pl.ds(column + e * width, width)]
        plgpu.copy_smem_to_gmem(smem["out"].at[wg, slot], target)
        if "residual" in gmem and e + slots - 1 < tiles:
            # The slot before this one is free as soon as its own tile has left shared memory.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            _load_residual(gmem, smem, wg, row, column, e + slots - 1, config)


def _prefetch_residual(gmem: Refs, smem: Refs, wg: Array, row: Array, column: Array, config: MatmulConfig) -> None:
    if "residual" in gmem:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for e in range(min(config.epilogue_slots - 1, config.tile_n // config.epilogue_n)):
            _load_residual(gmem, smem, wg, row, column, e, config)


def _load_residual(gmem: Refs, smem: Refs, wg: Array, row: Array, column: Array, e: int, config: MatmulConfig) -> None:
    slot, width = e % config.epilogue_slots, config.epilogue_n
    for name, buffer in (("residual", "out"), ("token_gate", "token_gate")):
        if name in gmem:
            source = gmem[name].at[pl.ds(row, _ROWS), pl.ds(column + e * width, width)]
            barrier = smem["tile_loaded"].at[wg * config.epilogue_slots + slot]
            plgpu.copy_gmem_to_smem(source, smem[buffer].at[wg, slot], barrier)


def _gelu(x: Array) -> Array:
    # 0.5 (1 + tanh u) = sigmoid(2 u): one exponential, and no tanh.approx, which has 11 bits only.
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x / (1 + jnp.exp(-2 * u))
