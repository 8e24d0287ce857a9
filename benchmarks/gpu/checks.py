"""Whether a fast kernel is right, told before it is told how fast it is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.sections import Row

# Of rows with the same numbers in the same order but another order of sums, in 16-bit results.
ROUNDING = 0.01


class Wrong(Exception):
    """A result that is not what the reference gives; its time is of no use."""


def compile_as(implementation: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """function compiled for the arguments.

    Raises:
        Wrong: "hopper" was asked for on a GPU and something else would compute it, as where a kernel does not take a
            shape or failed its check of itself. Its time would be told under the wrong name.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and implementation == "hopper" and "mosaic_gpu" not in (compiled.as_text() or ""):
        raise Wrong("the kernel was not used here: another implementation took its place")
    return compiled


def relative_error(result: Any, truth: Any) -> float:
    """L2 norm of the difference over that of the truth."""
    result, truth = (jnp.asarray(x, jnp.float32) for x in (result, truth))
    return float(jnp.linalg.norm((result - truth).ravel()) / jnp.linalg.norm(truth.ravel()))


def check(result: Any, truth: Any, most: float, what: str) -> float:
    """The relative error.

    Raises:
        Wrong: it is more than `most`, or the result holds NaN.
    """
    error = relative_error(result, truth)
    if not error <= most:
        raise Wrong(f"{what}: relative error {error:.3g} where at most {most} is right")
    return error


def check_finite(result: Any) -> None:
    """Raises Wrong where any number of a result is NaN or infinite."""
    if not bool(jnp.isfinite(result).all()):
        raise Wrong("the result holds NaN or infinity")


def some_rows(key: jax.Array, rows: int, count: int) -> np.ndarray:
    """Numbers of `count` rows, the first and the last among them."""
    drawn = np.asarray(jax.random.randint(key, (count - 2,), 0, rows))
    return np.unique(np.concatenate([[0, rows - 1], drawn]))


def errors_row(simulated: float | None, exact: float) -> Row:
    """error_of_kernel: against the same precision in jnp. relative_error: against float32."""
    row: Row = {"relative_error": float(f"{exact:.3g}")}
    return row if simulated is None else {"error_of_kernel": float(f"{simulated:.3g}"), **row}
