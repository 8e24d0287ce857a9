"""`python -m infer`: makes videos from prompts and images. `--help` lists what can be set."""

import sys


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    # Imported here, so that Ctrl-C during the imports ends as quietly as later.
    try:
        from x2v_jax.config.flags import HelpAsked
        from x2v_jax.errors import UserError

        from . import cli
    except KeyboardInterrupt:
        return 130
    try:
        cli.run(arguments)
    except HelpAsked:
        print(cli.help_text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; {str(interrupt) or cli.kept()}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from x2v_jax.cli import streams

    sys.exit(streams.run(main, sys.argv[1:]))
