"""The table of programs behind `x2v`, and where their code is."""

import dataclasses
import importlib
import types

from x2v_jax import shipped


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
