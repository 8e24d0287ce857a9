"""RMSNorm and rotary embedding of queries or keys in one Mosaic GPU kernel: a warpgroup a token.

Neighbouring channels turn as a pair, and a thread cannot reach into its neighbour's registers. So two 16-bit channels
travel as one 32-bit word, which splits into an even and an odd channel without leaving the register it is in.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.ops.fused_norms.reference import rmsnorm_rope_reference
from x2v_jax.ops.linear_8bit.choose import proved
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, round_to, row_scales

plgpu: Any = mosaic_gpu  # its annotations lag behind it

HEAD_DIM = 128
_PAIRS = HEAD_DIM // 2
_WARPS = 4
# A head is 64 words: one warp, two words a thread. A warpgroup has four heads at once.
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((_WARPS, _PAIRS), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
_HIGH_HALF = 0xFFFF0000
_LEAST_ROWS = 128
_MOST_HEADS = 40  # more would not stay in registers
# To the reference's result: sums in another order round a few values to the neighbouring bfloat16 or 8-bit value.
ALLOWED_ERROR = 0.003


def rope_hopper_works(x: Array, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the kernel takes x [B, L, D] and gives `dtype`, and has proved itself on this device."""
    heads, rest = divmod(x.shape[-1], HEAD_DIM)
    out = jnp.dtype(dtype)
    fits = head_dim == HEAD_DIM and not rest and heads % _WARPS == 0 and 0 < heads <= _MOST_HEADS
    fits = fits and x.dtype == jnp.bfloat16 and (out == jnp.bfloat16 or out.itemsize == 1)
    if not fits or x.shape[0] * x.shape[1] < _LEAST_ROWS:
        return False

    def arguments() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        angles = jnp.repeat(10 * jax.random.normal(keys[0], (80, _PAIRS)), 2, axis=1)
        sign = jnp.tile(jnp.array([-1.0, 1.0]), _PAIRS)
        x = jax.random.normal(keys[1], (2, 80, 12 * HEAD_DIM), jnp.bfloat16)
        weight = jax.random.normal(keys[2], x.shape[-1:])
        return x, weight, jnp.cos(angles), jnp.sin(angles) * sign, 1e-6, dtype

    return proved(
        "RMSNorm with rotary embedding",
        out.name,
        lambda: rmsnorm_rope_hopper(*arguments()),
        lambda: rmsnorm_rope_reference(*arguments()),
        ALLOWED_ERROR,
    )


def rmsnorm_rope_hopper(
    x: Float[Array, "b l d"],
    weight: Float[Array, " d"],
    cos: Float[Array, "l h"],
    sin: Float[Array, "l h"],
    eps: float,
    dtype: DTypeLike,
) -> Array | QuantizedRows:
    batch, length, width = x.shape
    heads = width // HEAD_DIM
    quantized = jnp.dtype(dtype).itemsize == 1
    word = jnp.uint16 if quantized else jnp.uint32
    rows = batch * length

    def kernel(
        x_g: jax.Ref, even_g: jax.Ref, odd_g: jax.Ref, cos_g: jax.Ref, sin_g: jax.Ref, out_g: jax.Ref, *scale_g: jax.Ref
    ) -> None:
        row = lax.axis_index("row")
        words = _load(x_g.at[row])
        even = lax.bitcast_convert_type(words << 16, jnp.float32)
        odd = lax.bitcast_convert_type(words & jnp.uint32(_HIGH_HALF), jnp.float32)
        squares = jnp.sum(jnp.sum(even * even + odd * odd, axis=1), axis=0)
        factor = lax.rsqrt(squares / width + eps)
        even, odd = even * factor * _load(even_g), odd * factor * _load(odd_g)
        token = lax.rem(row, length)
        cos, sin = (
            lax.broadcast_in_dim(_load(table.at[token], _LAYOUT.reduce(0)), even.shape, [1]) for table in (cos_g, sin_g)
        )
        even, odd = even * cos - odd * sin, odd * cos + even * sin
        if quantized:
            absmax = jnp.maximum(jnp.max(jnp.abs(even), axis=1), jnp.max(jnp.abs(odd), axis=1))
            scale, inverse = row_scales(absmax, dtype)
            inverse = lax.broadcast_in_dim(inverse, even.shape, [0])
            even, odd = round_to(even * inverse, dtype), round_to(odd * inverse, dtype)
            _store(scale_g[0], row, scale)
        else:
            even, odd = even.astype(dtype), odd.astype(dtype)
        _store(out_g, row, _bits(even, word) | (_bits(odd, word) << (jnp.dtype(word).itemsize * 4)))

    shapes = [jax.ShapeDtypeStruct((rows, heads, _PAIRS), word)]
    if quantized:
        shapes.append(jax.ShapeDtypeStruct((rows, heads), jnp.float32))
    weight = weight.astype(jnp.float32).reshape(heads, _PAIRS, 2)
    words, *scale = plgpu.kernel(
        kernel, out_type=tuple(shapes), grid=(rows,), grid_names=("row",), num_threads=1, thread_name="wg"
    )(
        lax.bitcast_convert_type(x.reshape(rows, heads, _PAIRS, 2), jnp.uint32),
        weight[..., 0],
        weight[..., 1],
        # Both channels of a pair turn by one angle; sin is negative in the even one.
        cos[:, 1::2],
        sin[:, 1::2],
    )
    result = lax.bitcast_convert_type(words, dtype).reshape(batch, length, heads, HEAD_DIM)
    return QuantizedRows(result, scale[0].reshape(result.shape[:-1])) if quantized else result


def _load(ref: object, layout: object = _LAYOUT) -> Array:
    # "optimized" is for shared memory only.
    return plgpu.load(ref, layout=layout, optimized=False)


def _store(ref: jax.Ref, row: Array, value: Array) -> None:
    if hasattr(plgpu, "store"):  # from jax 0.12 on, where a plain store asks for whole sectors of 32 bytes
        plgpu.store(ref.at[row], value, optimized=False)
    else:
        ref[row] = value


def _bits(x: Array, word: DTypeLike) -> Array:
    unsigned = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8
    return lax.bitcast_convert_type(x, unsigned).astype(word)
