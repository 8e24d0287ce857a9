"""Wall time of the parts of a run."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)


class Clock:
    """Adds up seconds by name, and logs them: `with clock("load"): …`. on_begin: called with each name as it begins."""

    def __init__(self, on_begin: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_begin = on_begin

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_begin is not None:
            self._on_begin(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            _log.debug("%s: %.2f s", name, seconds)
