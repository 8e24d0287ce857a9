"""Attention by every implementation and in every precision, beside cuDNN in the same process."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import shapes
from benchmarks.gpu.ceilings import measured_ceilings, share_of_ceiling
from benchmarks.gpu.checks import ROUNDING, check, check_finite, compile_as, errors_row, some_rows
from benchmarks.gpu.operations import attention_call
from benchmarks.gpu.sections import Row, guarded
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.shapes import AttentionShape
from benchmarks.gpu.timing import timed
from x2v_jax.ops.attention import attention
from x2v_jax.ops.attention.hopper_config import EIGHT_BIT_VALUES

KINDS = (
    ("cudnn", "full"),
    ("hopper", "full"),
    ("hopper", "int8"),
    ("hopper", "e4m3"),
    ("hopper", "int8_e4m3"),
    ("hopper", "e4m3_all"),
)
_TINY_KINDS = (("reference", "full"), ("reference", "e4m3_all"))
# The kernel rounds probabilities against the largest so far of a row, the simulation against the largest of all.
_MOST = {"full": ROUNDING, "int8": ROUNDING, "e4m3": ROUNDING, "int8_e4m3": 0.05, "e4m3_all": 0.05}
# Against float32; more than this is a mistake and not a precision.
_MOST_EXACT = {"full": 0.02, "int8": 0.06, "e4m3": 0.12, "int8_e4m3": 0.12, "e4m3_all": 0.15}
_CHECKED_ROWS = 128
_RAGGED_SHARE = 0.9


def attention_rows(settings: Settings) -> Iterator[Row]:
    """One row a shape, implementation and precision."""
    kinds = _TINY_KINDS if settings.tiny else KINDS
    for shape in attention_shapes(settings):
        data: dict[str, Any] = {}
        for implementation, precision in kinds:
            about = {"case": shape.name, "implementation": implementation, "precision": precision}
            yield guarded(
                settings, about, functools.partial(_measure, settings, shape, data, implementation, precision)
            )


def attention_shapes(settings: Settings) -> tuple[AttentionShape, ...]:
    if settings.tiny:
        return shapes.TINY_SELF_ATTENTION
    return shapes.SELF_ATTENTION if settings.quick else (*shapes.SELF_ATTENTION, *shapes.CROSS_ATTENTION)


def attention_data(settings: Settings, shape: AttentionShape) -> dict[str, Any]:
    """q, k, v and the number of keys that count; k has a mean, as the keys of a trained network do."""
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    tokens = (shape.queries, shape.keys, shape.keys)
    q, k, v = (
        jax.random.normal(key, (1, n, shape.heads, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, tokens, strict=False)
    )
    k = k + 2 * jax.random.normal(keys[3], (1, 1, shape.heads, shape.head_dim), jnp.bfloat16)
    length = int(shape.keys * _RAGGED_SHARE) - 3 if shape.ragged else shape.keys
    return {"q": q, "k": k, "v": v, "length": jnp.int32(length), "keys": length}


def check_attention(settings: Settings, shape: AttentionShape, data: dict[str, Any], out: Any, precision: str) -> Row:
    """Errors of some rows of a result, all heads.

    Raises:
        Wrong: they are too large.
    """
    check_finite(out)
    rows = some_rows(jax.random.key(settings.seed + 1), shape.queries, min(_CHECKED_ROWS, shape.queries))
    wanted = [("exact", jnp.float32, "full")] + [("same", jnp.bfloat16, precision)] * (precision != "full")
    for name, dtype, kind in wanted:
        if f"{name} {kind}" not in data:
            data[f"{name} {kind}"] = _reference(shape, data, rows, dtype, kind)
    got = out[:, rows]
    simulated = None
    if precision != "full":
        simulated = check(
            got, data[f"same {precision}"], _MOST[precision], f"{precision} against its own rounding in jnp"
        )
    return errors_row(simulated, check(got, data["exact full"], _MOST_EXACT[precision], f"{precision} against float32"))


def _reference(shape: AttentionShape, data: dict[str, Any], rows: Any, dtype: Any, precision: str) -> Any:
    q, k, v = data["q"][:, rows].astype(dtype), data["k"].astype(dtype), data["v"].astype(dtype)
    length = data["length"] if shape.ragged else None
    with jax.default_matmul_precision("highest"):
        call = functools.partial(attention, implementation="reference", precision=precision)  # pyright: ignore
        return jax.jit(lambda q, k, v, n: call(q, k, v, key_length=n))(q, k, v, length)


def _measure(
    settings: Settings, shape: AttentionShape, data: dict[str, Any], implementation: str, precision: str
) -> Row:
    if not data:
        data.update(attention_data(settings, shape))
    function, _ = attention_call(shape, precision, implementation)
    arguments = (data["q"], data["k"], data["v"], data["length"])
    compiled = compile_as(implementation, function, arguments)
    errors = check_attention(settings, shape, data, compiled(*arguments), precision)
    timing = timed(settings, lambda: compiled(*arguments))
    flops = shape.flops * data["keys"] // shape.keys
    work = work_of(shape, precision, flops)
    return {
        **errors,
        **timing.row(),
        "flops_a_second": flops / timing.median,
        "share_of_ceiling": share_of_ceiling(timing.median, work, measured_ceilings(settings)),
    }


def work_of(shape: AttentionShape, precision: str, flops: int) -> dict[str, float]:
    """Operations by dtype: half of them queries with keys, half probabilities with values; and bytes in and out."""
    low = {"int8": "int8", "int8_e4m3": "int8", "e4m3": "float8_e4m3fn", "e4m3_all": "float8_e4m3fn"}.get(
        precision, "bfloat16"
    )
    high = "float8_e4m3fn" if precision in EIGHT_BIT_VALUES else "bfloat16"
    work: dict[str, float] = {low: flops / 2}
    work[high] = work.get(high, 0) + flops / 2
    return work | {"bytes": 4 * (shape.queries + shape.keys) * shape.heads * shape.head_dim}
