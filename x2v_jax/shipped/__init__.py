"""What travels with the library: its version, the models in assets/, the config files in configs/, an example picture.

In a clone of the repository they lie beside x2v_jax; a wheel has them in this folder. Nothing here imports jax.
"""

import importlib.util
import os
import pathlib
import re
import sys
import types

from x2v_jax.errors import UserError

VERSION = "0.2.0"

_HERE = pathlib.Path(__file__).resolve().parent
IS_INSTALLED = (_HERE / "configs").is_dir()  # from a wheel; False in a clone, which is used where it lies
ROOT = _HERE if IS_INSTALLED else _HERE.parents[1]  # paths such as assets/shapes start here
# Program -> what `python -m` runs in a clone.
_MODULES = {"infer": "infer", "convert": "convert", "train": "train", "prepare": "train.prepare"}
# Folders of users that look like the name of an organisation in `checkpoints/wan`.
_OWN_FOLDERS = (
    "assets", "checkpoint", "checkpoints", "ckpt", "ckpts", "models", "outputs", "runs", "weights", "exports",
)  # fmt: skip
_FOLDERS = ("assets", "configs", "docs")


def find(path: str | os.PathLike[str], *, typed: bool = True) -> pathlib.Path:
    """Where a file or folder is that a user or a shipped config names; `locate` has the rule."""
    return pathlib.Path(locate(os.fspath(path), typed=typed)).expanduser()


def locate(path: str, *, typed: bool = True) -> str:
    """The path of what a user or a shipped config names.

    Args:
        path: absolute, or relative to the working directory or to what is shipped (`assets/shapes`).
        typed: whether the user wrote it. Then the working directory comes first; otherwise what is shipped does.

    Returns:
        `path` as it is where it means that file or folder, or where there is none at all.
    """
    own, shipped = pathlib.Path(path).expanduser(), _shipped(path)
    if shipped is None or (own.exists() and (typed or own.samefile(shipped))):
        return path
    return str(shipped)


def recorded(path: str) -> str:
    """A path as a record of a run keeps it: what is shipped by the name that it has everywhere."""
    if not pathlib.PurePath(path).is_absolute() or not pathlib.Path(path).is_relative_to(ROOT):
        return path
    name = pathlib.Path(path).relative_to(ROOT).as_posix()
    return name if name.split("/")[0] in _FOLDERS else path


def load_package(name: str, folder: pathlib.Path) -> types.ModuleType:
    """Imports the package in `folder` as the top-level `name`, whatever else of that name is on the path.

    Raises:
        UserError: the process has imported another package of that name.
    """
    if (loaded := sys.modules.get(name)) is not None:
        if [pathlib.Path(place).resolve() for place in getattr(loaded, "__path__", ())] != [folder]:
            raise UserError(f"this process has imported another {name!r} already; start the program by itself")
        return loaded
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader  # a .py file always has both
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing(path: pathlib.Path) -> str | None:
    """What brings a file of a shipped model that the wheel leaves out; None for any other file."""
    name = recorded(str(path.resolve()))
    if not IS_INSTALLED or not name.startswith("assets/"):
        return None
    folder = name.rsplit("/", 1)[0]
    return (
        f"{name} is left out of the installed package to keep it small; it lies in a clone of the project's "
        f"repository, so give the path of that clone's {folder}"
    )


def from_hub(name: str) -> str | None:
    """What brings a model whose name on the Hugging Face hub was given in place of a folder; None for other names."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", name)
    if match is None or pathlib.Path(match[1]).exists() or match[1].lower() in _OWN_FOLDERS:
        return None
    return (
        f"if it is a model of the Hugging Face hub, download it with `hf download {name} --local-dir {match[2]}`; "
        f"`{command(f'convert inspect {match[2]}')}` then says how it is converted, and the converted folder is what "
        "to give here"
    )


def command(text: str) -> str:
    """A command of this project as the user can type it, from its form after `x2v`: command("convert wan SRC DST").

    It begins with what the present program was started as: `x2v`, or `python -m` in a clone. For other programs, which
    use the library, a wheel says `x2v` and a clone `python -m`.
    """
    started = pathlib.PurePath(sys.argv[0] if sys.argv else "")
    if started.name == "__main__.py" and started.parent.name == "x2v_jax":
        return f"python -m x2v_jax {text}"
    name = text.split(" ", 1)[0]
    if started.stem == "x2v" or IS_INSTALLED or name not in _MODULES:
        return f"x2v {text}"
    return f"python -m {_MODULES[name]}{text.removeprefix(name)}"


def _shipped(path: str) -> pathlib.Path | None:
    parts = pathlib.PurePath(path).parts
    is_ours = bool(parts) and parts[0] in _FOLDERS and ".." not in parts
    return ROOT / path if is_ours and (ROOT / path).exists() else None
