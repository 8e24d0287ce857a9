"""What programs do about Ctrl-C and its like. Only command lines set handlers of signals, never the library."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

# SIGHUP comes when the terminal is closed; nohup has it ignored, and then it stays so.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def exit_on_sigterm() -> None:
    """From now on a polite kill unwinds the stack, so that unfinished output is removed; the exit code is 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class _Handlers:
    """Handlers in place of the ones before, until they are put back. ignored: take signals too that are ignored now."""

    def __init__(self, numbers: Iterable[int], handle: Callable[[int, Any], None], *, ignored: bool):
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in numbers:
                if ignored or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class StopFlag:
    """Turns SIGTERM and Ctrl-C into a request that a loop honours after its current step; until `restore`."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers = _Handlers((signal.SIGTERM, signal.SIGINT), self._request, ignored=True)

    def restore(self) -> None:
        self._handlers.restore()

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


class Interrupts:
    """While entered, the first of these signals raises KeyboardInterrupt in the main thread, and later ones do nothing.

    What is done about the first, such as closing a file, is therefore never interrupted by an impatient second.
    """

    def __init__(self) -> None:
        self.asked = False
        self._held = False
        self._handlers: _Handlers | None = None

    def __enter__(self) -> Self:
        self._handlers = _Handlers(_SIGNALS, self._handle, ignored=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handlers is not None:
            self._handlers.restore()

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
