"""Ctrl-C and its like, at any moment but in those that must not be cut short."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

# SIGHUP comes when the terminal is closed; nohup has it ignored, and then it stays so.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """While entered, the first of these signals raises KeyboardInterrupt in the main thread, and later ones do nothing.

    What is done about the first, such as closing a file, is therefore never interrupted by an impatient second.
    """

    def __init__(self) -> None:
        self.asked = False
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises the KeyboardInterrupt that a library may have swallowed."""
        if self.asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which nothing is raised; a signal that comes in it is raised at its end."""
        self._held = True
        already = self.asked
        try:
            yield
        finally:
            self._held = False
        if not already:
            self.check()

    def _handle(self, number: int, frame: Any) -> None:
        first, self.asked = not self.asked, True
        if first and not self._held:
            raise KeyboardInterrupt
