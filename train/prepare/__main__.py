"""python -m train.prepare prompts|videos|images|lmdb|check: parse, call, report. The work is in train.data."""

import sys

from x2v_jax.cli import streams
from x2v_jax.cli.interrupts import exit_on_sigterm
from x2v_jax.errors import UserError

from .arguments import parse


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 damage found by `check`, 2 a user's mistake, 130 interrupted."""
    exit_on_sigterm()
    try:
        args = parse(arguments)
        from . import commands

        return commands.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(streams.run(main))
