"""Standard output as programs find it: a pipe that is closed early, a full disk, a terminal without UTF-8."""

import errno
import io
import os
import sys
from collections.abc import Callable

# What a shell says of a program that SIGPIPE ended, as `yes | head` does.
_CLOSED_PIPE = 128 + 13


def run(main: Callable[..., int], *arguments: object) -> int:
    """main(*arguments) and its exit code, with no traceback for what became of standard output.

    A reader that has gone, such as `head`, ends the program quietly with 141. A full disk behind standard output is a
    sentence and 2. What the terminal's encoding does not have is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests put other things there
            stream.reconfigure(errors="replace")
    try:
        try:
            code = main(*arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        return _CLOSED_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _let_go()
        print(f"error: standard output cannot be written: {error.strerror}; free space there", file=sys.stderr)
        return 2
    return code


def _let_go() -> None:
    """What is still unwritten goes nowhere: Python would try again at exit, and print a traceback."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
