"""`x2v`: one command for all programs of the project.

In a wheel the programs lie in this folder; in a clone they are the top-level packages infer, convert and train.
"""

import sys
from collections.abc import Sequence

from x2v_jax.cli.programs import PROGRAMS, load
from x2v_jax.errors import UserError, did_you_mean
from x2v_jax.shipped import VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `x2v ARGUMENTS…` (sys.argv's without any) and returns the exit code: the program's, or 2 for a mistake."""
    given = sys.argv[1:] if arguments is None else arguments
    name, *rest = given or ["--help"]
    try:
        if name in ("-h", "--help", "help"):
            print(help_text())
            return 0
        if name in ("-V", "--version"):
            print(f"x2v {VERSION}")
            return 0
        if name == "completion":
            from x2v_jax.cli import completion

            return completion.main(rest)
        if name not in PROGRAMS:
            raise UserError(_unknown(name))
        return load(name, "__main__").main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # during imports; later the programs say what is kept
        return 130


def help_text() -> str:
    lines = ["usage: x2v COMMAND …", "", "commands:"]
    lines += [f"  {name:<12} {program.help}" for name, program in PROGRAMS.items()]
    lines += [f"  {'completion':<12} print a script that completes commands, config files and keys: bash or zsh"]
    return "\n".join([*lines, "", "`x2v COMMAND --help` lists what a command takes, and `x2v --version` the version."])


def _unknown(name: str) -> str:
    known = [*PROGRAMS, "completion", "--help", "--version"]
    return f"unknown command {name!r}; {did_you_mean(name, known, f'known: {", ".join(PROGRAMS)}')}"
