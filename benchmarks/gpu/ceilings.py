"""What this GPU reaches at best, measured: the largest products and copies that XLA and its libraries make of it."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.sections import Row, guarded, section_file
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.timing import timed

_ROWS_TIMES_COLUMNS = (((1,), (1,)), ((), ()))
# Of a product's operands -> of its result.
_RESULTS = {"bfloat16": jnp.float32, "int8": jnp.int32, "float8_e4m3fn": jnp.float32}


def ceilings(settings: Settings) -> Iterator[Row]:
    """Operations a second of products in 16 and 8 bits, bytes a second of a copy (read and written)."""
    size = 256 if settings.tiny else 16_384
    for dtype in _RESULTS:
        about = {"case": f"matmul {dtype}", "size": size}
        yield guarded(settings, about, functools.partial(_matmul, settings, dtype, size))
    elements = 1 << 16 if settings.tiny else 1 << 30
    yield guarded(settings, {"case": "copy", "bytes": 2 * elements}, lambda: _copy(settings, elements))


def measured_ceilings(settings: Settings) -> dict[str, float]:
    """What `ceilings` measured in this run: "bfloat16", "int8", "float8_e4m3fn" (operations a second), "bytes".

    What was not measured is not in it.
    """
    path = section_file(settings.out, "ceilings")
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    found = {}
    for row in rows:
        if "operations_a_second" in row:
            found[row["case"].removeprefix("matmul ")] = row["operations_a_second"]
        if "bytes_a_second" in row:
            found["bytes"] = row["bytes_a_second"]
    return found


def share_of_ceiling(seconds: float, work: dict[str, float], limits: dict[str, float]) -> float | None:
    """The time that the work takes at the ceilings, over the time that it took.

    Args:
        work: operations by the dtype that they are made in, and "bytes". Operations add up; bytes move beside them.
        limits: from `measured_ceilings`.

    Returns:
        None where a ceiling that is needed was not measured.
    """
    if any(name not in limits for name in work):
        return None
    compute = sum(amount / limits[name] for name, amount in work.items() if name != "bytes")
    return max(compute, work.get("bytes", 0) / limits.get("bytes", 1.0)) / seconds


def _matmul(settings: Settings, dtype: str, size: int) -> Row:
    def product(a: Any, b: Any) -> Any:
        y = jax.lax.dot_general(a, b, _ROWS_TIMES_COLUMNS, preferred_element_type=_RESULTS[dtype])
        return y.astype(jnp.bfloat16)

    a, b = (_draw(jax.random.key(settings.seed + i), (size, size), dtype) for i in range(2))
    call = jax.jit(product).lower(a, b).compile()
    timing = timed(settings, lambda: call(a, b))
    return {**timing.row(), "operations_a_second": 2 * size**3 / timing.median}


def _copy(settings: Settings, elements: int) -> Row:
    x = jnp.zeros((elements,), jnp.uint8)
    call: Callable[..., Any] = jax.jit(lambda x: x + jnp.uint8(1)).lower(x).compile()
    timing = timed(settings, lambda: call(x))
    return {**timing.row(), "bytes_a_second": 2 * elements / timing.median}


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
