"""Wall time of the parts of a run."""

import contextlib
import logging
import time
from collections.abc import Iterator

_log = logging.getLogger(__name__)


class Clock:
    """Adds up seconds by name, and logs them: `with clock("load"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            _log.debug("%s: %.2f s", name, seconds)
