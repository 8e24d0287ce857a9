"""LayerNorm, modulation and quantization in one Mosaic GPU kernel: a row is read once, 8 bits are written."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.ops.fused_norms.reference import layernorm_modulate_quantize_reference
from x2v_jax.ops.linear_8bit.choose import proved
from x2v_jax.ops.linear_8bit.hopper_rows import ALLOWED_ERROR, quantize_each_row, takes_rows
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

# Gives a thread its part of a row.
Loader = Callable[[Array | int], Array]


def layernorm_modulate_quantize_hopper(
    x: Float[Array, "b l d"],
    shift: Float[Array, "#b #l d"],
    scale: Float[Array, "#b #l d"],
    eps: float,
    dtype: DTypeLike,
) -> QuantizedRows:
    batch, length, width = x.shape
    scale = jnp.broadcast_to(scale, jnp.broadcast_shapes(scale.shape, shift.shape)).astype(jnp.float32)
    shift = jnp.broadcast_to(shift, scale.shape).astype(jnp.float32)
    batches, lengths = scale.shape[:2]

    def modulation_row(row: Array) -> Array | int:
        of_batch = lax.div(row, length) * lengths if batches > 1 else 0
        return of_batch + (lax.rem(row, length) if lengths > 1 else 0)

    def normalized(row: Array, x: Loader, shift: Loader, scale: Loader, total: Callable[..., Array]) -> Array:
        values = x(row).astype(jnp.float32)
        centred = values - total(jnp.sum, values, 0) / width
        normal = centred * lax.rsqrt(total(jnp.sum, centred * centred, 1) / width + eps)
        at = modulation_row(row)
        return normal * (1 + scale(at)) + shift(at)

    rows = [a.reshape(-1, width) for a in (x, shift, scale)]
    values, scales = quantize_each_row(normalized, rows, batch * length, width, dtype)
    return QuantizedRows(values.reshape(x.shape), scales.reshape(x.shape[:-1]))


def layernorm_hopper_works(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether the kernel takes rows of this shape, and has proved itself on this device."""

    def arguments() -> tuple[Any, ...]:
        x, shift, scale = (jax.random.normal(jax.random.key(i), (2, 80, 5120)) for i in range(3))
        return 3 * x + 1, shift[:, :1], 0.1 * scale[:, :1], 1e-6, dtype

    return takes_rows(shape) and proved(
        "LayerNorm with quantization",
        jnp.dtype(dtype).name,
        lambda: layernorm_modulate_quantize_hopper(*arguments()),
        lambda: layernorm_modulate_quantize_reference(*arguments()),
        ALLOWED_ERROR,
    )
