"""`x2v completion bash|zsh`: scripts for the shell, and what they ask: `x2v completion words SHELL LINE`."""

import argparse
import contextlib
import pathlib
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence

from x2v_jax import shipped
from x2v_jax.cli import PROGRAMS, load
from x2v_jax.errors import UserError

# Bash cuts words at = and :, so it gets only what comes behind the last of them. Without a word it looks for files.
_BASH = """# x2v's completion for bash: eval "$(x2v completion bash)"
_x2v() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" completion words bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[=/] ]]; then compopt -o nospace; fi
}
complete -o default -F _x2v x2v"""
_ZSH = """#compdef x2v
# x2v's completion for zsh: eval "$(x2v completion zsh)"
_x2v() {
    local -a found
    found=(${(f)"$("${words[1]}" completion words zsh "${(j: :)${(@q)words[1,CURRENT]}}" 2>/dev/null)"})
    if (( ! $#found )); then _files; return; fi
    compadd -Q -S '' -- ${(M)found:#*[=/]}
    compadd -Q -- ${found:#*[=/]}
}
compdef _x2v x2v"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def main(arguments: Sequence[str]) -> int:
    """Prints a script, or for a script the words that may follow.

    Raises:
        UserError: the shell is none that there is a script for.
    """
    if len(arguments) == 3 and arguments[0] == "words" and arguments[1] in _SCRIPTS:
        print("\n".join(words(arguments[2], shell=arguments[1])))
        return 0
    if len(arguments) != 1 or arguments[0] not in _SCRIPTS:
        given = " ".join(arguments) or "no shell"
        both = " or ".join(f"`{shipped.command(f'completion {shell}')}`" for shell in _SCRIPTS)
        raise UserError(f"completion: {given} is given; write {both}")
    print(_SCRIPTS[arguments[0]])
    return 0


def words(line: str, *, shell: str = "zsh") -> list[str]:
    """What may stand at the end of a command line that begins with x2v; empty where file names may.

    >>> words("x2v con")
    ['convert']

    Args:
        line: up to the cursor.
        shell: bash gets what comes behind the last = or : of the word.
    """
    try:
        parts = shlex.split(line)[1:]
    except ValueError:  # an open quotation mark
        return []
    if line[-1:].isspace():
        parts.append("")
    if not parts:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sorted(word for word in set(_candidates(parts)) if word.startswith(parts[-1]))
    begin = max(parts[-1].rfind("="), parts[-1].rfind(":")) + 1 if shell == "bash" else 0
    return [word[begin:] for word in found]


def _candidates(parts: list[str]) -> Iterable[str]:
    name, last = parts[0], parts[-1]
    if len(parts) == 1:
        return [*PROGRAMS, "completion", "--help", "--version"]
    if name == "completion":
        return _SCRIPTS if len(parts) == 2 else []
    if name not in PROGRAMS:
        return []
    if not PROGRAMS[name].takes_config:
        return _of_commands(load(name, "arguments").make_parser()[1], parts[1:])
    if parts[-2] == "--config":
        return _config_files(last)
    if last.startswith("--config="):
        return [f"--config={file}" for file in _config_files(last.removeprefix("--config="))]
    if last.startswith("--config."):
        return [] if "=" in last else [f"--config.{key}=" for key in _keys(parts, load(name, "cli").DEFAULT_CONFIG)]
    if not last.startswith("-") and last:
        return []
    options = load(name, "cli").OPTIONS
    switches = [f"--{option}" + ("=" if o.value else "") for option, o in options.items() if option != "config"]
    return [*switches, "--config=", "--config.", "--help"]


def _config_files(typed: str) -> list[str]:
    from x2v_jax.config.load import shipped_configs

    here = pathlib.Path(typed.rpartition("/")[0] or ".").expanduser()
    own = []
    with contextlib.suppress(OSError):
        before = typed[: typed.rfind("/") + 1]
        own = [f"{before}{p.name}" + ("/" if p.is_dir() else "") for p in here.iterdir() if not p.name.startswith(".")]
    return [*shipped_configs(), "configs/lightx2v.py:", *(file for file in own if file.endswith((".py", ".json", "/")))]


def _keys(parts: Sequence[str], default: str) -> list[str]:
    from x2v_jax.config.load import load_config

    spec = default
    for word, following in zip(parts, [*parts[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            spec = following if word == "--config" else word.removeprefix("--config=")
    with contextlib.suppress(UserError):
        return [*_flat(load_config(spec, typed=spec is not default))]
    return []


def _flat(config: object, before: str = "") -> Iterable[str]:
    from ml_collections import ConfigDict

    for key, value in config.items() if isinstance(config, ConfigDict) else ():
        yield from _flat(value, f"{before}{key}.") if isinstance(value, ConfigDict) and len(value) else [before + key]


def _of_commands(commands: Mapping[str, argparse.ArgumentParser], parts: Sequence[str]) -> list[str]:
    """Commands of a program, or the options of the one that is given."""
    if len(parts) == 1:
        return [*commands, "--help"]
    if parts[0] not in commands or not parts[-1].startswith("-"):
        return []
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", commands[parts[0]].format_help())
