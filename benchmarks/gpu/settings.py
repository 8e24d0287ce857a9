"""What a measurement is asked for. No jax import."""

import dataclasses
import pathlib
import time


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:

    quick: fewer runs and only the headline shapes, so that everything together takes less than ten minutes.
    tiny: networks and shapes that a CPU runs in seconds, to try the programs out; such numbers say nothing.
    seed: of weights and inputs. What is reported as correct was so on this data.
    out: folder of the reports.
    profile: record one run of each model with the profiler.
    deadline: time.monotonic() after which no further case is begun; None: no limit.
    """

    out: pathlib.Path
    quick: bool = False
    tiny: bool = False
    seed: int = 0
    profile: bool = False
    deadline: float | None = None

    @property
    def rounds(self) -> int:
        """Samples of a time."""
        return 3 if self.tiny else 5 if self.quick else 15

    @property
    def sample_seconds(self) -> float:
        """How long a sample lasts at least: short kernels are called several times in it."""
        return 0.0 if self.tiny else 0.02 if self.quick else 0.1

    def time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline
