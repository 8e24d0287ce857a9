"""Norms fused with what follows them, beside XLA's fusions of the same."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import shapes
from benchmarks.gpu.ceilings import measured_ceilings, share_of_ceiling
from benchmarks.gpu.checks import ROUNDING, check, check_finite, compile_as
from benchmarks.gpu.operations import norm_quantize_call, norm_rope_call
from benchmarks.gpu.sections import Row, guarded
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.shapes import NormShape
from benchmarks.gpu.timing import timed

_OPERATIONS = (
    ("norm, modulation, quantization", norm_quantize_call, "int8"),
    ("norm, modulation, quantization", norm_quantize_call, "float8_e4m3fn"),
    ("norm and rotation", norm_rope_call, "bfloat16"),
    ("norm, rotation, quantization", norm_rope_call, "int8"),
    ("norm, rotation, quantization", norm_rope_call, "float8_e4m3fn"),
)


def norm_rows(settings: Settings) -> Iterator[Row]:
    """One row a shape, operation and implementation."""
    for shape in shapes.TINY_NORMS if settings.tiny else shapes.NORMS[:4] if settings.quick else shapes.NORMS:
        for name, make, dtype in _OPERATIONS:
            for implementation in ("reference",) if settings.tiny else ("reference", "hopper"):
                about = {"case": shape.name, "operation": name, "dtype": dtype, "implementation": implementation}
                yield guarded(
                    settings, about, lambda m=make, d=dtype, i=implementation, s=shape: _measure(settings, s, m, d, i)
                )


def _measure(settings: Settings, shape: NormShape, make: Any, dtype: str, implementation: str) -> Row:
    function, structs = make(shape, dtype, implementation)
    keys = jax.random.split(jax.random.key(settings.seed), len(structs))
    arguments = [
        jax.random.normal(key, s.shape, jnp.float32).astype(s.dtype) for key, s in zip(keys, structs, strict=True)
    ]
    compiled = compile_as(implementation, function, arguments)
    out = compiled(*arguments)
    truth = jax.jit(make(shape, dtype, "reference")[0])(*arguments)
    error = check(_plain(out), _plain(truth), ROUNDING, "against the reference")
    check_finite(_plain(out))
    timing = timed(settings, lambda: compiled(*arguments))
    moved = sum(x.nbytes for x in jax.tree.leaves((arguments, out)))
    return {
        "relative_error": error,
        **timing.row(),
        "bytes_a_second": moved / timing.median,
        "share_of_ceiling": share_of_ceiling(timing.median, {"bytes": moved}, measured_ceilings(settings)),
    }


def _plain(out: Any) -> Any:
    """Dequantized rows."""
    if isinstance(out, tuple):
        return out[0].astype(jnp.float32) * out[1][..., None]
    return out.astype(jnp.float32)
