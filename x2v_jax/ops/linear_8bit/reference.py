"""The 8-bit linear layer in jnp: exact sums, bounded memory, any platform."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

Activation = Literal["gelu_tanh"] | None

_LAST_WITH_LAST = (((1,), (1,)), ((), ()))


def matmul_8bit(
    x: QuantizedRows,
    weight: Array,
    scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None,
    activation: Activation,
    gate: Float[Array, "#m n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype: DTypeLike,
    float8_product: bool = False,
) -> Float[Array, "m n"]:
    """x.values [M, K] times weight [N, K] transposed, in 8 bits, then `epilogue`.

    int8 products are summed in int32, which is exact: K * 127^2 < 2^31 for K up to 133,000. float8_e4m3fn products are
    exact in float32 and summed there.

    The scales come after the product: on a row or column before it, XLA would multiply them in and leave 8 bits.

    Args:
        float8_product: for a GPU that multiplies float8. Else bfloat16, which holds e4m3 exactly, stands in: XLA has no
            fast float8 product for CPUs and older GPUs.
    """
    values = x.values
    sum_dtype = jnp.int32 if values.dtype == jnp.int8 else jnp.float32
    if values.dtype != jnp.int8 and not float8_product:
        values, weight = values.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    sums = lax.dot_general(values, weight, _LAST_WITH_LAST, preferred_element_type=sum_dtype)
    y = sums.astype(jnp.float32) * x.scale[:, None] * scale[None]
    return epilogue(y, bias, activation, gate, residual).astype(out_dtype)


def matmul_16bit(
    x: Float[Array, "m k"],
    weight: Array,
    scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None,
    activation: Activation,
    gate: Float[Array, "#m n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """x [M, K] in its own dtype times an 8-bit weight [N, K]: only the weight is quantized.

    The weight is converted and not scaled before the product: int8 and e4m3 are exact in bfloat16 while int8 * scale is
    not, and the conversion then fuses into the matmul or lives as long as this one matrix. The scale is per output
    channel, so that it can wait until after the sum.
    """
    y = lax.dot_general(x, weight.astype(x.dtype), _LAST_WITH_LAST, preferred_element_type=jnp.float32)
    return epilogue(y * scale[None], bias, activation, gate, residual).astype(out_dtype)


def epilogue(
    y: Float[Array, "m n"],
    bias: Float[Array, " n"] | None,
    activation: Activation,
    gate: Float[Array, "#m n"] | None,
    residual: Float[Array, "m n"] | None,
) -> Float[Array, "m n"]:
    """residual + gate * activation(y + bias), each part where it is given, in float32."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    if activation == "gelu_tanh":
        y = jax.nn.gelu(y, approximate=True)
    if gate is not None:
        y = y * gate.astype(jnp.float32)
    return y if residual is None else residual.astype(jnp.float32) + y
