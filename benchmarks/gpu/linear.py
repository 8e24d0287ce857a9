"""8-bit linear layers, quantization of their input included, beside XLA's 16-bit product and its 8-bit pattern."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import shapes
from benchmarks.gpu.ceilings import measured_ceilings, share_of_ceiling
from benchmarks.gpu.checks import ROUNDING, check, check_finite, compile_as, errors_row, some_rows
from benchmarks.gpu.operations import linear_call, linear_data, plain_linear, quantized_weight
from benchmarks.gpu.sections import Row, guarded
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.shapes import LinearShape
from benchmarks.gpu.timing import timed

KINDS = (
    ("xla", "bfloat16"), ("xla", "int8"), ("hopper", "int8"), ("xla", "float8_e4m3fn"), ("hopper", "float8_e4m3fn")
)  # fmt: skip
_TINY_KINDS = (("xla", "bfloat16"), ("reference", "int8"))
# Against float32, on data with some channels eight times the others.
_MOST_EXACT = {"bfloat16": 0.01, "int8": 0.05, "float8_e4m3fn": 0.08}
_CHECKED_ROWS = 256


def linear_rows(settings: Settings) -> Iterator[Row]:
    """One row a shape, implementation and dtype."""
    for shape in linear_shapes(settings):
        data: dict[str, Any] = {}
        for implementation, dtype in _TINY_KINDS if settings.tiny else KINDS:
            about = {"case": shape.name, "implementation": implementation, "dtype": dtype}
            yield guarded(settings, about, functools.partial(_measure, settings, shape, data, implementation, dtype))


def linear_shapes(settings: Settings) -> tuple[LinearShape, ...]:
    """With --quick those of one model at 480P and those of the other in a chunk."""
    if settings.tiny:
        return shapes.TINY_LINEAR
    if not settings.quick:
        return shapes.LINEAR
    wanted = (("14B", "480P"), ("14B", "720P"), ("1.3B", "chunk"))
    return tuple(s for s in shapes.LINEAR if any(s.name.startswith(m) and s.name.endswith(z) for m, z in wanted))


def _measure(settings: Settings, shape: LinearShape, data: dict[str, Any], implementation: str, dtype: str) -> Row:
    if not data:
        data.update(linear_data(shape, jax.random.key(settings.seed)))
    if dtype == "bfloat16":
        function = plain_linear(shape, jnp.bfloat16)
        arguments = tuple(data[name] for name in ("x", "weight", "bias", "gate", "residual"))
    else:
        function, _ = linear_call(shape, dtype, implementation)
        weight, scale = quantized_weight(data["weight"], dtype)
        arguments = (data["x"], weight, scale, data["bias"], data["gate"], data["residual"])
    compiled = compile_as(implementation, function, arguments)
    errors = check_linear(settings, shape, data, dtype, arguments, compiled(*arguments))
    timing = timed(settings, lambda: compiled(*arguments))
    item = 2 if dtype == "bfloat16" else 1
    out_item = 4 + 4 if shape.epilogue == "residual" else 2
    moved = 2 * shape.m * shape.k + item * shape.n * shape.k + out_item * shape.m * shape.n
    return {
        **errors,
        **timing.row(),
        "flops_a_second": shape.flops / timing.median,
        "bytes_a_second": moved / timing.median,
        "share_of_ceiling": share_of_ceiling(
            timing.median, {dtype: shape.flops, "bytes": moved}, measured_ceilings(settings)
        ),
    }


def check_linear(
    settings: Settings, shape: LinearShape, data: dict[str, Any], dtype: str, arguments: Any, out: Any
) -> Row:
    """Errors of some rows of a result, all columns.

    Raises:
        Wrong: they are too large.
    """
    check_finite(out)
    rows = some_rows(jax.random.key(settings.seed + 1), shape.m, min(_CHECKED_ROWS, shape.m))
    part = data["residual"][rows] if shape.epilogue == "residual" else data["residual"]
    with jax.default_matmul_precision("highest"):
        exact = plain_linear(shape, jnp.float32)(data["x"][rows], data["weight"], data["bias"], data["gate"], part)
        simulated = None
        if dtype != "bfloat16":
            reference, _ = linear_call(shape, dtype, "reference")
            same = jax.jit(reference)(arguments[0][rows], *arguments[1:5], part)
            simulated = check(out[rows], same, ROUNDING, f"{dtype} against its own rounding in jnp")
    return errors_row(simulated, check(out[rows], exact, _MOST_EXACT[dtype], f"{dtype} against float32"))
