"""Fast paths prove themselves: each is compared with its reference on a small input, once on a kind of device.

A kernel that is wrong on some device, driver or compiler must not make wrong videos. `works` runs the comparison the
first time that it is asked for a path, and says no, with one warning, where the error is more than allowed.
"""

import dataclasses
import threading
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FastPath:
    """What is compared, and what is used where it fails.

    Attributes:
        op: such as "attention"; implementation: such as "hopper"; precision: such as "int8".
        instead: what is computed where it fails, for the warning.
        way_out: a setting that avoids it, should a comparison never end.
    """

    op: str
    implementation: str
    precision: str
    instead: str = "the reference"
    way_out: str = ""


@dataclasses.dataclass
class _Verdict:
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    works: bool | None = None


# Seconds after which a comparison is said to take long. Most of one is compiling.
_PATIENCE = 60.0
_verdicts: dict[tuple[FastPath, str], _Verdict] = {}


def works(path: FastPath, error: Callable[[], float], allowed: float) -> bool:
    """Whether `error()` is at most `allowed`; asked once for a path and kind of device, then remembered.

    May be called anywhere, also while a program is traced: `error` runs in a thread of its own, to which traces,
    meshes and other contexts of the caller do not reach. It compares arrays that it makes itself.

    Args:
        error: a relative error. An exception counts as a failure, and is named in the warning.
    """
    # setdefault is one step, also between threads.
    verdict = _verdicts.setdefault((path, jax.devices()[0].device_kind), _Verdict())
    with verdict.lock:
        if verdict.works is None:
            measured = _in_own_thread(error, path)
            verdict.works = isinstance(measured, float) and measured <= allowed
            if not verdict.works:
                _warn(path, measured, allowed)
    return verdict.works


def relative_error(x: jax.Array, y: jax.Array) -> jax.Array:
    """|x - y| / |y| over all elements, in float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)


def forget() -> None:
    """Forgets what was found, as if nothing had been asked yet."""
    _verdicts.clear()


def _in_own_thread(error: Callable[[], float], path: FastPath) -> float | Exception:
    result: list[float | Exception] = []

    def run() -> None:
        try:
            result.append(float(error()))
        except Exception as failure:  # whatever is wrong with it, there is another path
            result.append(failure)

    thread = threading.Thread(target=run, name="self-check", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        # A kernel that hangs cannot be stopped; the process can.
        advice = f"; should it not end, stop the process and set {path.way_out}" if path.way_out else ""
        warnings.warn(
            f"{_named(path)} is still being compared after {_PATIENCE:g} s{advice}", RuntimeWarning, stacklevel=4
        )
        thread.join()
    return result[0]


def _warn(path: FastPath, measured: float | Exception, allowed: float) -> None:
    if isinstance(measured, Exception):
        lines = str(measured).strip().splitlines()
        found = f"failed with {type(measured).__name__}: {lines[0] if lines else ''}"
    else:
        found = f"has a relative error of {measured:.3g}, {allowed:.3g} are allowed"
    message = f"{_named(path)} {found}, on {jax.devices()[0].device_kind}: using {path.instead} instead"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _named(path: FastPath) -> str:
    return f"{path.op} by {path.implementation!r} in precision {path.precision!r}"
