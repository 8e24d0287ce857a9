"""The large operations at a shape: functions, arguments as shapes, and random data for them.

Compilation without a GPU (`benchmarks.aot.kernels`) and the measurements on one take the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.shapes import HEAD_DIM, AttentionShape, LinearShape, NormShape
from x2v_jax.ops.attention import attention
from x2v_jax.ops.fused_norms import layernorm_modulate_quantize, rmsnorm_rope
from x2v_jax.ops.linear_8bit import QuantizedRows, linear_8bit, quantize_weight

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def attention_call(shape: AttentionShape, precision: str, implementation: str) -> Call:
    """attention(q, k, v, number of keys that count), and shapes of its arguments."""

    def call(q: Any, k: Any, v: Any, length: Any) -> Any:
        return attention(
            q,
            k,
            v,
            key_length=length if shape.ragged else None,
            implementation=implementation,  # pyright: ignore[reportArgumentType]
            precision=precision,  # pyright: ignore[reportArgumentType]
        )

    q = struct((1, shape.queries, shape.heads, shape.head_dim), jnp.bfloat16)
    k = struct((1, shape.keys, shape.heads, shape.head_dim), jnp.bfloat16)
    return call, (q, k, k, struct((), jnp.int32))


def linear_call(shape: LinearShape, dtype: str, implementation: str) -> Call:
    """A quantized layer with its epilogue on 16-bit rows that it quantizes, and shapes of its arguments.

    Arguments: x, weight, scale, bias, gate, residual; the last two are not used without a residual.
    """

    def call(x: Any, weight: Any, scale: Any, bias: Any, gate: Any, residual: Any) -> Any:
        more: dict[str, Any] = {"out_dtype": jnp.bfloat16}
        if shape.epilogue == "gelu":
            more["activation"] = "gelu_tanh"
        if shape.epilogue == "residual":
            more = {"out_dtype": jnp.float32, "gate": gate, "residual": residual}
        return linear_8bit(x, weight, scale, bias, implementation=implementation, **more)  # pyright: ignore[reportArgumentType]

    return call, (
        struct((shape.m, shape.k), jnp.bfloat16),
        struct((shape.n, shape.k), dtype),
        struct((shape.n,), jnp.float32),
        struct((shape.n,), jnp.float32),
        struct((shape.n,), jnp.float32),
        struct((shape.m, shape.n), jnp.float32) if shape.epilogue == "residual" else struct((), jnp.float32),
    )


def plain_linear(shape: LinearShape, dtype: Any) -> Callable[..., Any]:
    """The same layer with weights [n, k] that are not quantized, as XLA makes it: products in `dtype`."""

    def call(x: Any, weight: Any, bias: Any, gate: Any, residual: Any) -> Any:
        y = jax.lax.dot_general(
            x.astype(dtype), weight.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        y = y + bias
        if shape.epilogue == "residual":
            return residual + gate * y
        y = jax.nn.gelu(y) if shape.epilogue == "gelu" else y
        return y.astype(dtype)

    return call


def linear_data(shape: LinearShape, key: jax.Array) -> dict[str, Any]:
    """x, weight, bias, gate, residual: rows as after a LayerNorm, a few of whose channels are large."""
    keys = jax.random.split(key, 5)
    channels = jnp.where(jnp.arange(shape.k) % 97 == 0, 8.0, 1.0)
    x = jax.random.normal(keys[0], (shape.m, shape.k), jnp.bfloat16) * channels.astype(jnp.bfloat16)
    residual = shape.epilogue == "residual"
    return {
        "x": x,
        "weight": jax.random.normal(keys[1], (shape.n, shape.k), jnp.bfloat16) * shape.k**-0.5,
        "bias": 0.1 * jax.random.normal(keys[2], (shape.n,)),
        "gate": jax.random.normal(keys[3], (shape.n,)),
        "residual": jax.random.normal(keys[4], (shape.m, shape.n)) if residual else jnp.zeros(()),
    }


def quantized_weight(weight: Any, dtype: str) -> tuple[Any, Any]:
    return jax.jit(functools.partial(quantize_weight, dtype=dtype))(weight)


def hopper_attention(shape: AttentionShape, precision: str) -> Call:
    return attention_call(shape, precision, "hopper")


def hopper_linear(shape: LinearShape, dtype: str) -> Call:
    return linear_call(shape, dtype, "hopper")


def norm_quantize_call(shape: NormShape, dtype: str, implementation: str) -> Call:
    """LayerNorm, modulation and quantization of rows; arguments: x, shift, scale."""

    def call(x: Any, shift: Any, scale: Any) -> Any:
        rows = layernorm_modulate_quantize(x, shift, scale, 1e-6, dtype, implementation=implementation)  # pyright: ignore[reportArgumentType]
        return rows.values, rows.scale

    row = struct((1, 1, shape.dim), jnp.float32)
    return call, (struct((1, shape.rows, shape.dim), jnp.float32), row, row)


def norm_rope_call(shape: NormShape, dtype: str, implementation: str) -> Call:
    """RMSNorm of queries and their rotation, in 8 bits or 16; arguments: x, weight, cosines, sines."""

    def call(x: Any, weight: Any, cos: Any, sin: Any) -> Any:
        y = rmsnorm_rope(x, weight, 1e-6, (cos, sin), dtype=dtype, implementation=implementation)  # pyright: ignore[reportArgumentType]
        return (y.values, y.scale) if isinstance(y, QuantizedRows) else y

    angles = struct((shape.rows, HEAD_DIM), jnp.float32)
    x = struct((1, shape.rows, shape.dim), jnp.bfloat16)
    return call, (x, struct((shape.dim,), jnp.float32), angles, angles)


def hopper_norm_quantize(shape: NormShape, dtype: str) -> Call:
    return norm_quantize_call(shape, dtype, "hopper")


def hopper_norm_rope(shape: NormShape, dtype: str) -> Call:
    return norm_rope_call(shape, dtype, "hopper")
