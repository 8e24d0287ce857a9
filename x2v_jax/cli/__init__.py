"""`x2v`: one command for all programs of the project.

In a wheel the programs lie in this folder; in a clone they are the top-level packages infer, convert and train.
"""

import dataclasses
import importlib
import sys
import types
from collections.abc import Sequence

from x2v_jax import shipped
from x2v_jax.errors import UserError, did_you_mean
from x2v_jax.shipped import VERSION


@dataclasses.dataclass(frozen=True)
class Program:
    """One command of `x2v`.

    Attributes:
        package: of its code; its `__main__` has main(arguments) -> exit code.
        help: what it does, for the list of commands.
        takes_config: whether it reads --config and --config.KEY; its `cli` then has OPTIONS and DEFAULT_CONFIG. The
            others have commands of their own, and `arguments` has make_parser().
    """

    package: str
    help: str
    takes_config: bool = False


# A new program is a line here, and its package a line in setup.py.
PROGRAMS = {
    "infer": Program("infer", "make videos from prompts and images", takes_config=True),
    "convert": Program("convert", "convert, inspect, quantize and export checkpoints"),
    "train": Program("train", "train and distil models", takes_config=True),
    "prepare": Program("train.prepare", "make, import and check the data that training reads"),
}


def load(name: str, module: str) -> types.ModuleType:
    """A module of a program: that of the wheel, or in a clone the file that `python -m` runs there too.

    A clone's package is taken by its path, since a user's own `train/` may be the first of that name.
    """
    package = PROGRAMS[name].package
    if shipped.IS_INSTALLED:
        return importlib.import_module(f"x2v_jax.cli.{package}.{module}")
    top = package.split(".")[0]
    shipped.load_package(top, shipped.ROOT / top)
    return importlib.import_module(f"{package}.{module}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `x2v ARGUMENTS…` (sys.argv's without any) and returns the exit code: the program's, or 2 for a mistake."""
    from x2v_jax.cli import streams

    return streams.run(_main, sys.argv[1:] if arguments is None else arguments)


def _main(given: Sequence[str]) -> int:
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
