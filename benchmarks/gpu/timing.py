"""Times of compiled programs: medians with their spread, nothing of compilation in them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.settings import Settings


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call. low and high: the fastest and the slowest sample; calls: in each sample."""

    median: float
    low: float
    high: float
    samples: int
    calls: int = 1

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), calls)

    def row(self) -> dict[str, float]:
        """As JSON values, to four digits."""
        digits = {name: float(f"{getattr(self, name):.4g}") for name in ("median", "low", "high")}
        return {"seconds": digits["median"], "fastest": digits["low"], "slowest": digits["high"], "calls": self.calls}


def timed(settings: Settings, call: Callable[[], Any]) -> Timing:
    """The time of `call`, which starts work on the device and returns its arrays. Two calls go before and do not count.

    A sample is several calls in a row where one is short: the device is kept busy, so that what the host takes to start
    a call is hidden behind the one before, as in a real program.
    """
    import jax

    jax.block_until_ready(call())
    once = _seconds(call, 1)
    calls = max(1, min(1000, math.ceil(settings.sample_seconds / max(once, 1e-7))))
    return Timing.of([_seconds(call, calls) for _ in range(settings.rounds)], calls)


def _seconds(call: Callable[[], Any], calls: int) -> float:
    import jax

    begin = time.perf_counter()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - begin) / calls


class Stopwatch:
    """Wall-clock seconds of parts, by name, with the device's work in them.

    >>> watch = Stopwatch()
    >>> watch("text", lambda: 1)
    1
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__[T](self, name: str, call: Callable[[], T]) -> T:
        import jax

        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result
