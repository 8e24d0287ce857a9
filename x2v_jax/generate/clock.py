"""Wall time of the parts of a run."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up seconds by name: `with clock("load"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
