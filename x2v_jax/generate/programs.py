"""The compiled programs of a run by name, so that they can be compiled before there is anything to run them on."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A jitted function and arguments, arrays or their shapes, that it will be called with.

    static: keyword arguments that the function is compiled for; None: none.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any] | None = None


def compile_all(
    programs: Iterable[Program], on_start: Callable[[str], None] | None = None
) -> Iterator[tuple[str, float]]:
    """Compiles one after the other; yields each one's name and the seconds it took, and calls on_start with it before.

    The compiled programs go to jax's persistent cache, where the same calls find them later; nothing is run.
    """
    for program in programs:
        if on_start is not None:
            on_start(program.name)
        begin = time.perf_counter()
        program.function.lower(*program.arguments, **(program.static or {})).compile()
        yield program.name, time.perf_counter() - begin
