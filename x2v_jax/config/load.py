"""Runs config files: the shipped ones, and the user's own."""

import ast
import importlib.util
import pathlib
import traceback
import types
import warnings

import ml_collections

from x2v_jax import shipped
from x2v_jax.errors import UserError, did_you_mean

# Where helpers lay before -> where they are. The old places work in a clone for one release.
MOVED = {f"configs.{name}": f"x2v_jax.config.{name}" for name in ("flags", "inference", "training", "distillation")}


def load_config(spec: str, *, typed: bool = True) -> ml_collections.ConfigDict:
    """The locked config that `FILE.py[:ARGUMENT]` gives: its get_config() or get_config(ARGUMENT).

    Args:
        spec: the file and what its get_config takes; or LightX2V's JSON file.
        typed: whether a user wrote it: then FILE is looked for in the working directory first, and only then among the
            shipped ones.

    Raises:
        UserError: no such file, it cannot be run, or it gives no config.
    """
    if is_json(spec):  # LightX2V's own settings: its reader is shipped
        return load_config(f"configs/lightx2v.py:{spec}", typed=False)
    name, argument = split(spec)
    path = shipped.find(name, typed=typed)
    if not path.is_file():
        known = shipped_configs()
        advice = did_you_mean(name, known, f"give an existing one, such as {known[0]}", cutoff=0.5)
        raise UserError(f"--config={spec}: no such file; {advice}")
    try:
        get_config = _run(path).get_config
        config = get_config() if argument is None else get_config(argument)
    except UserError:
        raise
    except TypeError as error:
        needs = "an argument: write FILE.py:ARGUMENT" if argument is None else "no argument"
        raise UserError(f"--config={spec}: get_config takes {needs} ({_where(error)})") from error
    except Exception as error:  # whatever the user's file raises is the user's to see, as one sentence
        if isinstance(error, ImportError) and (advice := _moved(path)):
            raise UserError(f"--config={spec}: {advice}") from error
        raise UserError(f"--config={spec} does not load: {_where(error)}; mend that file") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={spec}: get_config returned a {type(config).__name__}; return a ConfigDict")
    config.lock()
    return config


def split(spec: str) -> tuple[str, str | None]:
    """File and argument of `FILE[.py][:ARGUMENT]`.

    >>> split("configs/lightx2v.py:a.json")
    ('configs/lightx2v.py', 'a.json')
    """
    name, colon, argument = spec.partition(".py:")
    return name.removesuffix(".py") + ".py", argument if colon else None


def is_json(spec: str) -> bool:
    """Whether a config that the user named is a JSON file and no Python file, as LightX2V's are.

    >>> is_json("wan_t2v.json"), is_json("configs/lightx2v.py:wan_t2v.json"), is_json("configs/shapes/t2v")
    (True, False, False)
    """
    name, argument = split(spec)
    if argument is not None or spec.endswith(".py"):
        return False
    path = pathlib.Path(spec).expanduser()
    return path.suffix.lower() == ".json" or (path.is_file() and not shipped.find(name).is_file())


def is_shipped(spec: str) -> bool:
    """Whether a config that the user named comes from a shipped file alone, without an argument of the user's."""
    name, argument = split(spec)
    return (
        argument is None and not is_json(spec) and shipped.find(name).resolve().is_relative_to(shipped.ROOT / "configs")
    )


def shipped_configs() -> list[str]:
    """The shipped config files that take no argument, such as configs/shapes/t2v.py."""
    return sorted(p.relative_to(shipped.ROOT).as_posix() for p in (shipped.ROOT / "configs").glob("*/[!_]*.py"))


def _run(path: pathlib.Path) -> types.ModuleType:
    name = f"config_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec and module_spec.loader  # a .py file always has both
    module = importlib.util.module_from_spec(module_spec)
    if not shipped.IS_INSTALLED and importlib.util.find_spec("configs") is None:
        shipped.load_package("configs", shipped.ROOT / "configs")  # `x2v` outside the clone, and an old import
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=DeprecationWarning, module=name)  # else only __main__ shows them
        module_spec.loader.exec_module(module)
    return module


def _moved(path: pathlib.Path) -> str | None:
    """What to write instead of the first import of a config file that worked in earlier versions, or in a clone."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        for name in filter(lambda name: not _is_importable(name), names):
            if name in MOVED:
                return f"{name} has moved; import {MOVED[name]} in line {node.lineno} of {path} instead"
            if (file := name.replace(".", "/") + ".py") in shipped_configs():
                return (
                    f"{name} cannot be imported here; take that config in line {node.lineno} of {path} with "
                    f"x2v_jax.config.load.load_config({file!r})"
                )
    return None


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its package is not there
        return False


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
