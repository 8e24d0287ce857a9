"""Linear layers whose weights, and by default activations, are 8-bit."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.errors import UserError
from x2v_jax.ops.choice import LinearActivations
from x2v_jax.ops.linear_8bit.choose import Implementation, check_implementation, wants_hopper, xla_product
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, name_of, quantize_rows_reference
from x2v_jax.ops.linear_8bit.reference import Activation, epilogue, matmul_8bit, matmul_16bit

Activations = LinearActivations


def linear_8bit(
    x: Float[Array, "*b k"] | QuantizedRows,
    weight: Array,
    scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None = None,
    *,
    activation: Activation = None,
    gate: Float[Array, "..."] | None = None,
    residual: Float[Array, "*b n"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    activations: Activations = "8bit",
    implementation: Implementation = "auto",
) -> Float[Array, "*b n"]:
    """residual + gate * activation(x @ (weight * scale[:, None]).T + bias), each part where it is given.

    Gradients reach x, bias, gate and residual; weight and scale are frozen, as under LoRA, and get none. Rounding
    activations passes gradients straight through: dx = dy @ (weight * scale), multiplied in bfloat16.

    Args:
        x: [..., K] floats, or rows already quantized (`quantize_rows`, `layernorm_modulate_quantize`).
        weight: [N, K] int8 or float8_e4m3fn, one row an output channel.
        scale: [N] float32, the weight's scales.
        bias: [N].
        activation: None or "gelu_tanh".
        gate: broadcasts to [..., N].
        residual: [..., N], added in float32.
        out_dtype: of the result.
        activations: "8bit" quantizes x a row at a time and multiplies in 8 bits; "16bit" multiplies in x's own dtype
            with a weight that is converted inside the program, one matrix at a time, whoever else is asked for.
        implementation: "reference" (any platform), "xla" (XLA's 8-bit products on NVIDIA GPUs), "hopper" (our kernel,
            on GPUs of compute capability 9; shapes that `config.takes` refuses go to XLA) or "auto": the first of
            hopper, xla, reference that the GPU and dtype have. On other platforms all of them are the reference.

    Raises:
        UserError: an unknown word, shapes or dtypes that do not fit each other, an implementation that this GPU lacks.
    """
    lead = _check(x, weight, scale, bias, residual, activation, activations, implementation)
    n, k = weight.shape
    options = _LinearOptions(activation, jnp.dtype(out_dtype).name, activations, implementation)
    if activations == "8bit" and not isinstance(x, QuantizedRows):
        x = quantize_rows(x, weight.dtype, implementation=implementation)
    if gate is not None:
        # One gate for all rows stays one: kernels read it once.
        gate = gate.reshape(1, n) if gate.size == n else jnp.broadcast_to(gate, (*lead, n)).reshape(-1, n)
    residual = None if residual is None else residual.reshape(-1, n)
    y: Any = _linear(options, _flat(x, k), weight, scale, bias, gate, residual)
    return y.reshape(*lead, n)


def _flat(x: Any, k: int) -> Any:
    if not isinstance(x, QuantizedRows):
        return x.reshape(-1, k)
    source = None if x.source is None else x.source.reshape(-1, k)
    return QuantizedRows(x.values.reshape(-1, k), x.scale.reshape(-1), source)


def quantize_rows(
    x: Float[Array, "*b k"],
    dtype: DTypeLike,
    *,
    plus: Float[Array, "*b k"] | None = None,
    implementation: Implementation = "auto",
) -> QuantizedRows:
    """Quantizes each row of activations by its own largest magnitude, computed in float32.

    int8: scale = absmax / 127. float8_e4m3fn: scale = max(absmax / 448, 1 / (448 * 512)). These are the scales of the
    dynamic per-token kernels of vLLM that LightX2V calls. Values are rounded to nearest, ties to even. A row of zeros
    gives zeros; a row with a NaN or an infinity gives a scale that makes every product with it NaN or infinite.
    Gradients pass through `source`.

    Args:
        x: [..., K], any float dtype.
        dtype: int8 or float8_e4m3fn.
        plus: added to x first, in float32.
        implementation: as for `linear_8bit`; "hopper" reads x once, XLA twice.
    """
    check_implementation(implementation)
    name_of(dtype)
    reference = lambda x, *plus: quantize_rows_reference(x, dtype, *plus)  # noqa: E731
    arrays = (x,) if plus is None else (x, plus)
    held = lax.stop_gradient(arrays)
    kernel = None
    if wants_hopper(implementation):
        # Imported where it may be needed: Mosaic is half a second that a CPU can do without.
        from x2v_jax.ops.linear_8bit.hopper_rows import quantize_rows_hopper, rows_hopper_works

        if rows_hopper_works(x.shape, dtype):
            kernel = lambda x, *plus: quantize_rows_hopper(x, dtype, *plus)  # noqa: E731
    rows = reference(*held) if kernel is None else lax.platform_dependent(*held, cuda=kernel, default=reference)
    return rows._replace(source=x if plus is None else x + plus)


# What follows the product, where it is given.
_Given = Array | None


@dataclasses.dataclass(frozen=True)
class _LinearOptions:
    activation: Activation
    out_dtype: str
    activations: Activations
    implementation: Implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    options: _LinearOptions, x: Any, weight: Array, scale: Array, bias: _Given, gate: _Given, residual: _Given
) -> Array:
    tail = (weight, scale, bias, options.activation, gate, residual, options.out_dtype)
    if options.activations == "16bit":
        return matmul_16bit(x, *tail)
    return _product(options, QuantizedRows(x.values, x.scale), weight, scale, bias, gate, residual)


def _product(
    options: _LinearOptions,
    x: QuantizedRows,
    weight: Array,
    scale: Array,
    bias: Array | None,
    gate: Array | None,
    residual: Array | None,
) -> Array:
    def with_arrays(matmul: Any, **more: Any) -> Any:
        return lambda x, weight, scale, bias, gate, residual: matmul(
            x, weight, scale, bias, options.activation, gate, residual, options.out_dtype, **more
        )

    arrays = (x, weight, scale, bias, gate, residual)
    reference = with_arrays(matmul_8bit)
    if wants_hopper(options.implementation):
        from x2v_jax.ops.linear_8bit.choose_hopper import matmul_config
        from x2v_jax.ops.linear_8bit.hopper import matmul_hopper

        config = matmul_config(x, weight, bias, options.activation, gate, residual, options.out_dtype)
        if config is not None:
            kernel = with_arrays(matmul_hopper, config=config)
            return lax.platform_dependent(*arrays, cuda=kernel, default=reference)
    if xla_product(options.implementation, weight.dtype):
        return lax.platform_dependent(*arrays, cuda=with_arrays(matmul_8bit, float8_product=True), default=reference)
    return reference(*arrays)


def _forward(
    options: _LinearOptions, x: Any, weight: Array, scale: Array, bias: _Given, gate: _Given, residual: _Given
) -> tuple[Array, Any]:
    rows = isinstance(x, QuantizedRows)
    source = x.source if rows else x
    kind = QuantizedRows(*[None] * 3) if rows else None  # pyright: ignore[reportArgumentType]
    like = None if residual is None else jnp.zeros((0,), residual.dtype)
    return _linear(options, x, weight, scale, bias, gate, residual), (kind, source, weight, scale, bias, gate, like)


def _backward(options: _LinearOptions, kept: Any, dy: Array) -> tuple[Any, ...]:
    kind, source, weight, scale, bias, gate, like = kept
    if source is None:
        raise TypeError("these quantized rows have no gradient: they were made without a source")
    dy = dy.astype(jnp.float32)
    wide = weight.astype(jnp.bfloat16)
    z = lax.dot_general(
        source.astype(jnp.bfloat16), wide, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # compiled away unless GELU or the gate's gradient needs it
    pull = jax.vjp(
        lambda z, bias, gate: epilogue(z, bias, options.activation, gate, None), z * scale[None], bias, gate
    )[1]
    dz, dbias, dgate = pull(dy)
    dx = jnp.dot((dz * scale[None]).astype(jnp.bfloat16), wide, preferred_element_type=jnp.float32).astype(source.dtype)
    return (
        dx if kind is None else kind._replace(source=dx),
        None,
        None,
        dbias,
        dgate,
        None if like is None else dy.astype(like.dtype),
    )


_linear.defvjp(_forward, _backward)


def _check(
    x: Any,
    weight: Any,
    scale: Any,
    bias: Array | None,
    residual: Array | None,
    activation: Any,
    activations: Any,
    implementation: Any,
) -> tuple[int, ...]:
    """x's leading axes; UserError where the arguments do not fit."""
    check_implementation(implementation)
    if activations not in get_args(Activations):
        raise UserError(f"linear_activations is {activations!r}; it must be one of {', '.join(get_args(Activations))}")
    if activation not in (None, "gelu_tanh"):
        raise UserError(f"activation is {activation!r}; it must be None or 'gelu_tanh'")
    dtype = name_of(weight.dtype)
    values = x.values if isinstance(x, QuantizedRows) else x
    if isinstance(x, QuantizedRows):
        if activations == "16bit":
            raise UserError("linear_activations is '16bit' and x is quantized: pass x itself")
        if values.dtype != weight.dtype:
            raise UserError(f"rows of {values.dtype} cannot be multiplied with weights of {dtype}: quantize them alike")
    elif not jnp.issubdtype(values.dtype, jnp.floating):
        raise UserError(f"x is {values.dtype}; it must be floats or rows that quantize_rows made")
    if weight.ndim != 2 or values.shape[-1:] != weight.shape[1:]:
        raise UserError(f"x {values.shape} does not fit a weight [out, in] of {weight.shape}")
    n, lead = weight.shape[0], values.shape[:-1]
    for name, array, shape in (("scale", scale, (n,)), ("bias", bias, (n,)), ("residual", residual, (*lead, n))):
        if array is not None and array.shape != shape:
            raise UserError(f"{name} has shape {array.shape}; with this x and weight it must have {shape}")
    return lead
