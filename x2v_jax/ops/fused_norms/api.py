"""The typed entries to norms that are fused with what follows them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.errors import UserError
from x2v_jax.ops.fused_norms.reference import (
    layernorm_modulate,
    layernorm_modulate_quantize_reference,
    rmsnorm_rope_float32,
    rmsnorm_rope_reference,
)
from x2v_jax.ops.linear_8bit.choose import Implementation, check_implementation, wants_hopper
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, name_of

Tables = tuple[Float[Array, "l h"], Float[Array, "l h"]]


def layernorm_modulate_quantize(
    x: Float[Array, "b l d"],
    shift: Float[Array, "#b #l d"],
    scale: Float[Array, "#b #l d"],
    eps: float,
    dtype: DTypeLike,
    *,
    implementation: Implementation = "auto",
) -> QuantizedRows:
    """quantize_rows(layernorm(x) * (1 + scale) + shift): LayerNorm without parameters, modulation, 8 bits a token.

    An affine LayerNorm is the case scale = weight - 1. Gradients pass through the result's `source`.

    Args:
        shift, scale: [B or 1, 1 or L, D], as `modulation_parts` gives them.
        dtype: int8 or float8_e4m3fn.
        implementation: "hopper" (one kernel that reads x once) or "auto" (that, where the GPU is a Hopper); "xla" and
            "reference" are jnp. Shapes that the kernel does not take are jnp too.

    Raises:
        UserError: an unknown word, or shapes that do not fit.
    """
    check_implementation(implementation)
    name_of(dtype)
    for name, part in (("shift", shift), ("scale", scale)):
        fits = part.ndim == 3 and all(n in (1, m) for n, m in zip(part.shape, x.shape, strict=True))
        if not fits or part.shape[-1] != x.shape[-1]:
            raise UserError(f"{name} has shape {part.shape}; for x {x.shape} it must be [B or 1, 1 or L, D]")
    arrays = lax.stop_gradient((x, shift, scale))
    reference = functools.partial(layernorm_modulate_quantize_reference, eps=eps, dtype=dtype)
    kernel = None
    if wants_hopper(implementation):
        from x2v_jax.ops.fused_norms.hopper import layernorm_hopper_works, layernorm_modulate_quantize_hopper

        if layernorm_hopper_works(x.shape, dtype):
            kernel = functools.partial(layernorm_modulate_quantize_hopper, eps=eps, dtype=dtype)
    rows = reference(*arrays) if kernel is None else lax.platform_dependent(*arrays, cuda=kernel, default=reference)
    return rows._replace(source=layernorm_modulate(x, shift, scale, eps))


def rmsnorm_rope(
    x: Float[Array, "b l d"],
    weight: Float[Array, " d"],
    eps: float,
    rope: Tables,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Any:
    """Queries or keys of all heads normalised as one row, then turned: RMSNorm over D, rotary embedding in each head.

    Args:
        weight: of the RMSNorm.
        rope: (cos, sin), each [L, head_dim] float32, for adjacent pairs as in `models.rope.RopeTables`: cos twice,
            and -sin, sin.
        dtype: of the result; int8 or float8_e4m3fn quantizes each head of each token by its own scale.
        implementation: as for `layernorm_modulate_quantize`; the kernel takes bfloat16 x and heads of 128.

    Returns:
        [B, L, heads, head_dim]; or `QuantizedRows` of that with scales [B, L, heads].

    Raises:
        UserError: an unknown word, or shapes that do not fit.
    """
    check_implementation(implementation)
    cos, sin = rope
    head_dim = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] != x.shape[1] or x.shape[-1] % head_dim or head_dim % 2:
        raise UserError(f"tables {cos.shape} and {sin.shape} do not fit x {x.shape}: they must be [L, head_dim]")
    if weight.shape != x.shape[-1:]:
        raise UserError(f"weight has shape {weight.shape}; for x {x.shape} it must be {x.shape[-1:]}")
    reference: Any = functools.partial(rmsnorm_rope_reference, eps=eps, dtype=dtype)
    kernel = None
    if wants_hopper(implementation):
        from x2v_jax.ops.fused_norms.hopper_rope import rmsnorm_rope_hopper, rope_hopper_works

        if rope_hopper_works(x, head_dim, dtype):
            kernel = functools.partial(rmsnorm_rope_hopper, eps=eps, dtype=dtype)

    def forward(*arrays: Array) -> Any:
        return reference(*arrays) if kernel is None else lax.platform_dependent(*arrays, cuda=kernel, default=reference)

    arrays = (x, weight, cos, sin)
    if jnp.dtype(dtype).itemsize == 1:
        name_of(dtype)
        return forward(*lax.stop_gradient(arrays))._replace(source=rmsnorm_rope_float32(*arrays, eps=eps))
    return _with_gradient_of(reference, forward)(*arrays) if kernel else reference(*arrays)


def _with_gradient_of(exact: Any, forward: Any) -> Any:
    """`forward`, which has no gradient, with that of `exact` at the same inputs."""
    function = jax.custom_vjp(forward)
    function.defvjp(
        lambda *arrays: (forward(*arrays), arrays), lambda arrays, gradient: jax.vjp(exact, *arrays)[1](gradient)
    )
    return function
