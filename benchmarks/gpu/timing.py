"""Times of compiled programs, medians with their spread and nothing of compilation in them; of whole runs by parts."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.settings import Settings

# Not the time of tracing, whose events of nested functions lie within one another.
_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
# Seconds of a part that is called once more and no oftener.
_LONG = 5.0


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


class CompileClock:
    """Seconds that jax has spent on lowering and compiling in this process, look-ups in its cache included."""

    def __init__(self) -> None:
        import jax

        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _COMPILING:
            self.seconds += duration_secs


@dataclasses.dataclass
class Part:
    """seconds: of each call but the first; first: of that, compiling included; compiling: so much of it."""

    name: str
    seconds: list[float]
    first: float
    compiling: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        return {
            "part": self.name,
            "seconds": _digits(self.median),
            "fastest": _digits(min(self.seconds)),
            "slowest": _digits(max(self.seconds)),
            "first_call_seconds": _digits(self.first),
            "compile_seconds": _digits(self.compiling),
        }


class Parts:
    """Times parts by name and remembers them.

    Args:
        settings: says how often a part is called; one that takes long is called once more and no oftener.
        rounds: calls after the first one, for all parts; None: by their time.
    """

    def __init__(self, settings: Settings, rounds: int | None = None):
        self.rounds = rounds
        self._quick = settings.quick or settings.tiny
        self._clock = CompileClock()
        self.found: list[Part] = []

    def __call__[T](self, name: str, call: Callable[[], T], rounds: int | None = None) -> T:
        """The last result of `call`, which returns arrays or what has been waited for.

        Args:
            rounds: calls after the first one; None: 1 to 5, by how long that took. With 0 the first one counts, less
                the time of compiling.
        """
        import jax

        before = self._clock.seconds
        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        first, compiling = time.perf_counter() - begin, self._clock.seconds - before
        rounds = self.rounds if rounds is None else rounds
        if rounds is None:
            rounds = 1 if first - compiling > _LONG else 2 if self._quick else 5
        seconds = [] if rounds else [first - compiling]
        for _ in range(rounds):
            begin = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begin)
        self.found.append(Part(name, seconds, first, compiling))
        return result


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def peak_bytes() -> int | None:
    """The most that the device's allocator has held in this process; None where the device does not say."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
