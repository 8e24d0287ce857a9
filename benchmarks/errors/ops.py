"""Errors of the operations in low precision, on recorded numbers and on random ones with tails of several weights."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.errors.kv_cache import DRAWS, NARROW, attention_errors
from benchmarks.errors.record import Recording, smoothed_case, smoothed_cases
from x2v_jax.checkpoint.quantize.calibration import Calibration
from x2v_jax.ops.attention import attention
from x2v_jax.ops.linear_8bit import linear_8bit, quantize_weight
from x2v_jax.ops.linear_8bit.api import Activations

# name -> (type of the weights, activations)
LINEAR: dict[str, tuple[str, Activations]] = {
    "bfloat16": ("bfloat16", "16bit"),
    "int8, W8A8": ("int8", "8bit"),
    "fp8, W8A8": ("float8_e4m3fn", "8bit"),
    "int8, weights only": ("int8", "16bit"),
    "fp8, weights only": ("float8_e4m3fn", "16bit"),
}
# name -> the one of LINEAR that is computed after smoothing
SMOOTHED = {f"{name}, smoothed": name for name in ("int8, W8A8", "fp8, W8A8", "int8, weights only")}
# name -> precision of `attention`
ATTENTION = {"bfloat16": "full", "int8": "int8", "e4m3": "e4m3", "int8_e4m3": "int8_e4m3", "e4m3_all": "e4m3_all"}
RECORDED = "recorded"
_ROWS, _INPUTS, _OUTPUTS = 256, 1536, 1536
_TOKENS, _HEADS, _HEAD_DIM = 512, 2, 128

Row = dict[str, Any]


def operation_rows(recording: Recording, calibration: Calibration) -> Iterator[Row]:
    """One row an operation, precision and kind of data: the median and the worst relative error over all cases.

    Args:
        calibration: of the network that was recorded, on other prompts.
    """
    matrices = {RECORDED: [case for cases in recording.matrices.values() for case in cases]}
    matrices |= {kind: [_random_matrix(kind)] for kind in DRAWS}
    for kind, cases in matrices.items():
        for name in LINEAR:
            yield _row("linear", name, kind, [linear_error(name, *case) for case in cases])
        even = list(smoothed_cases(recording, calibration)) if kind == RECORDED else [_smoothed_matrix(kind)]
        for name, base in SMOOTHED.items():
            yield _row("linear", name, kind, [linear_error(base, *case) for case in even])
    attentions = {RECORDED: [case for cases in recording.attentions.values() for case in cases]}
    attentions |= {kind: [_random_attention(kind)] for kind in DRAWS}
    for kind, cases in attentions.items():
        for name in ATTENTION:
            yield _row("attention", name, kind, [attention_error(name, *case) for case in cases])
    for kind in DRAWS:
        for name, error in zip(NARROW, attention_errors(kind), strict=True):
            yield _row("KV cache", name, kind, [error])


def linear_error(name: str, x: Any, kernel: Any, bias: Any) -> float:
    """Relative error of x @ kernel + bias. x: [..., in], kernel: [in, out]."""
    exact, low = _linear(name)(x.reshape(-1, x.shape[-1]), kernel, bias)
    return relative(low, exact)


def attention_error(name: str, q: Any, k: Any, v: Any) -> float:
    exact, low = _attention(name)(q, k, v)
    return relative(low, exact)


@functools.cache
def _linear(name: str) -> Callable[..., Any]:
    dtype, activations = LINEAR[name]

    def both(x: Any, kernel: Any, bias: Any) -> Any:
        exact = jnp.dot(x, kernel, precision="highest") + bias
        given = x.astype(jnp.bfloat16)
        if dtype == "bfloat16":
            low = jnp.dot(given, kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32) + bias
            return exact, low.astype(jnp.bfloat16)
        weight, scale = quantize_weight(kernel.T, dtype)
        return exact, linear_8bit(
            given, weight, scale, bias, activations=activations, implementation="reference", out_dtype=jnp.bfloat16
        )

    return jax.jit(both)


@functools.cache
def _attention(name: str) -> Callable[..., Any]:
    def both(q: Any, k: Any, v: Any) -> Any:
        low = (x.astype(jnp.bfloat16) for x in (q, k, v))
        made = attention(*low, implementation="reference", precision=ATTENTION[name])  # pyright: ignore
        return attention(q, k, v, implementation="reference"), made

    return jax.jit(both)


def _random_matrix(kind: str) -> tuple[Any, ...]:
    x = DRAWS[kind](jax.random.key(0), (_ROWS, _INPUTS))
    kernel = jax.random.normal(jax.random.key(1), (_INPUTS, _OUTPUTS)) / math.sqrt(_INPUTS)
    return x, kernel, jnp.zeros((_OUTPUTS,))


def _smoothed_matrix(kind: str) -> tuple[Any, ...]:
    """Calibrated on another draw."""
    x, kernel, bias = _random_matrix(kind)
    seen = DRAWS[kind](jax.random.key(2), (_ROWS, _INPUTS))
    return smoothed_case(x, kernel, bias, jnp.abs(seen).max(0), jnp.abs(kernel).max(1))


def _random_attention(kind: str) -> tuple[Any, ...]:
    shape = (1, _TOKENS, _HEADS, _HEAD_DIM)
    q, k, v = (DRAWS[kind](jax.random.key(i), shape) for i in range(3))
    # So that the logits are spread as after the norms of queries and keys, whatever the tails.
    q, k = (x / jnp.sqrt(jnp.mean(x**2)) for x in (q, k))
    return q, k, v


def _row(operation: str, name: str, kind: str, errors: Sequence[float]) -> Row:
    median, worst = float(np.median(errors)), max(errors)
    return {
        "operation": operation,
        "precision": name,
        "data": kind,
        "median": median,
        "worst": worst,
        "cases": len(errors),
    }


def relative(low: Any, exact: Any) -> float:
    """L2 norm of the difference over that of what is exact."""
    low, exact = np.asarray(low, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(low - exact) / np.linalg.norm(exact))
