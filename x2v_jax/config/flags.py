"""Command lines of the form `--config=FILE.py[:ARGUMENT] --config.KEY=VALUE`, with errors that are sentences.

ml_collections' own flags end in tracebacks on a misspelt key; here every mistake is a UserError that names the nearest
known key. Nothing in this file imports jax.
"""

import ast
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import ml_collections
from ml_collections import config_dict

from x2v_jax.config.load import is_shipped, load_config
from x2v_jax.errors import UserError, closest, did_you_mean


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config. A default that is a type means: None unless set, then of this type."""

    name: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Option:
    """One option beside --config. `value` names what it takes; None for a switch."""

    help: str
    value: str | None = None


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A parsed command line. `overrides` are the --config.KEY values in their own types, already set in `config`.

    is_shipped: whether the config file is one of the project's.
    """

    config: ml_collections.ConfigDict
    config_file: str | None
    overrides: dict[str, Any]
    options: dict[str, Any]
    is_shipped: bool = True

    def is_typed(self, name: str) -> bool:
        """Whether the user wrote the value of a key, on the command line or in a config file."""
        return name in self.overrides or not self.is_shipped


class HelpAsked(Exception):
    """--help was given."""


def make_config(keys: Iterable[Key], **values: object) -> ml_collections.ConfigDict:
    """A locked config with the given keys; `values` replace defaults."""
    config = ml_collections.ConfigDict()
    for key in keys:
        config[key.name] = config_dict.placeholder(key.default) if isinstance(key.default, type) else key.default
    config.lock()
    for name, value in values.items():
        set_key(config, name, value)
    return config


def parse(
    argv: Sequence[str],
    *,
    default_config: str,
    options: Mapping[str, Option],
    other_names: Mapping[str, str] | None = None,
    optional: Mapping[str, type] | None = None,
) -> CommandLine:
    """Reads a command line.

    Args:
        argv: without the program's name.
        default_config: the config file without --config.
        options: name (without dashes) -> Option.
        other_names: what similar programs call an option -> what to write here; for error messages.
        optional: keys of groups that a config may leave out, with the dots in their names -> their types.

    Raises:
        UserError: an unknown option or key, a value of the wrong type, a config file that does not load.
        HelpAsked: --help or -h is there.
    """
    file, texts, found = None, {}, {}
    rest = list(argv)
    while rest:
        name, has_value, text = rest.pop(0).partition("=")
        name = _own_spelling(name, options)
        if name in ("-h", "--help"):
            raise HelpAsked
        takes_value = name.startswith("--config") or (name[2:] in options and options[name[2:]].value is not None)
        if takes_value and not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name} needs a value; write {name}=VALUE")
            text = rest.pop(0)
        if name == "--config":
            file = text
        elif name.startswith("--config."):
            texts[name.removeprefix("--config.")] = text
        elif name.startswith("--") and name[2:] in options:
            if has_value and not takes_value:
                raise UserError(f"{name} takes no value; write {name} alone")
            found[name[2:]] = text if takes_value else True
        else:
            known = [f"--{option}" for option in options] + ["--config", "--help"]
            raise UserError(_unknown_option(name, known, load_config(default_config, typed=False), other_names or {}))
    config = load_config(file) if file else load_config(default_config, typed=False)
    overrides = {}
    for name, text in texts.items():
        group = name.split(".")[0]
        if group not in config and any(key.startswith(f"{group}_") for key in config):
            name = name.replace(".", "_")  # keys that belong together may be written as of a group: rollout.mode
        _make_room(config, name, optional or {})
        overrides[name] = parse_value(config, name, text)
        set_key(config, name, overrides[name])
    return CommandLine(config, file, overrides, found, is_shipped=file is None or is_shipped(file))


def set_key(config: ml_collections.ConfigDict, name: str, value: object) -> None:
    """config.name = value, for dotted names too. Lists become tuples where the key is one.

    Raises:
        UserError: unknown key or wrong type.
    """
    holder, last = _holder(config, name)
    wanted = holder.get_type(last)
    if wanted is tuple and isinstance(value, list):
        value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if wanted is tuple and isinstance(value, str | dict):
        value = (value,)  # one entry, where several could be
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    mixed_up = isinstance(value, bool) and wanted is not bool  # bool is an int to isinstance
    if value is not None and (mixed_up or not isinstance(value, wanted)):
        raise UserError(f"config.{name} is {value!r}; give a value of type {wanted.__name__}")
    holder[last] = value


def parse_value(config: ml_collections.ConfigDict, name: str, text: str) -> object:
    """A command line's text as a value of the key's type.

    Raises:
        UserError: unknown key, or text that is no such value.
    """
    holder, last = _holder(config, name)
    wanted = holder.get_type(last)
    if issubclass(wanted, ml_collections.ConfigDict):
        raise UserError(f"config.{name} is a group of keys; set one of them, as in config.{name}.KEY=VALUE")
    # A text may really be "None": it means no value only where there is none now.
    if text == "None" and (holder[last] is None or wanted in (int, float, tuple)):
        return None
    if wanted is str:
        return text
    if wanted is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"config.{name} is {text!r}; write true or false")
        return text.lower() in ("true", "1", "yes")
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            what = "whole number" if wanted is int else "number"
            raise UserError(f"config.{name} is {text!r}; give a {what}") from None
    return _parse_tuple(text)


def help_text(usage: str, options: Mapping[str, Option], keys: Iterable[Key], config_file: str = "") -> str:
    """What --help prints. config_file: the one that is run without --config, whose values are the defaults."""
    values = load_config(config_file, typed=False) if config_file else {}
    lines = [usage.rstrip(), "", "options:"]
    for name, option in options.items():
        lines.append(f"  --{name}{'=' + option.value if option.value else '':<{22 - len(name)}} {option.help}")
    for i, key in enumerate(keys):
        of = f", in brackets as {config_file} has them" if config_file else ""
        lines += [] if i else ["", f"keys (--config.KEY=VALUE){of}:"]
        value = values.get(key.name, None if isinstance(key.default, type) else key.default)
        default = "" if value is None else f" [{value}]"
        lines.append(f"  {key.name:<22} {key.help}{default}")
    return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' or the known names."""
    known = sorted(known)
    return did_you_mean(name, known, f"known: {', '.join(known)}")


def _holder(config: ml_collections.ConfigDict, name: str) -> tuple[ml_collections.ConfigDict, str]:
    *groups, last = name.split(".")
    holder: Any = config
    for i, part in enumerate([*groups, last]):
        if entries := _entries(holder):
            if i == len(groups) or not part.isdecimal() or int(part) >= len(entries):
                key, last_number = f"config.{'.'.join(groups[:i])}", len(entries) - 1
                raise UserError(f"{key} has the entries 0 to {last_number}; write --{key}.0.KEY=VALUE")
            holder = entries[int(part)]
            continue
        if not isinstance(holder, ml_collections.ConfigDict) or part not in holder:
            known = holder.keys() if isinstance(holder, ml_collections.ConfigDict) else []
            if not known:
                parent = ".".join([*groups, last][:i])
                raise UserError(f"config.{parent} is one value without keys; write --config.{parent}=VALUE")
            raise UserError(f"config has no key {'.'.join([*groups, last][: i + 1])!r}; {nearest(part, known)}")
        if i < len(groups):
            holder = holder[part]
    return holder, last


def _own_spelling(name: str, options: Mapping[str, Option]) -> str:
    """--dry-run is --dry_run: other programs write the one, and keys the other."""
    underscored = name[2:].replace("-", "_")
    return f"--{underscored}" if name.startswith("--") and underscored in options else name


def _entries(value: object) -> tuple[ml_collections.ConfigDict, ...]:
    """The groups that a key holds one after the other, as phases does; none where it holds anything else."""
    found = cast("tuple[object, ...]", value) if isinstance(value, tuple) else ()
    groups = tuple(entry for entry in found if isinstance(entry, ml_collections.ConfigDict))
    return groups if len(groups) == len(found) else ()


def _make_room(config: ml_collections.ConfigDict, name: str, optional: Mapping[str, type]) -> None:
    """Puts an optional key into its group, as one that may be None, if it is not there."""
    group, _, key = name.rpartition(".")
    known = [of.removeprefix(f"{group}.") for of in optional if group and of.startswith(f"{group}.")]
    holder: Any = config.get(group) if known else None
    if not isinstance(holder, ml_collections.ConfigDict) or key in holder:
        return
    if key not in known:
        raise UserError(f"config has no key {name!r}; {nearest(key, {*known, *holder.keys()})}")
    with holder.unlocked():
        holder[key] = config_dict.placeholder(optional[name])


def _parse_tuple(text: str) -> tuple[Any, ...]:
    for candidate in (text, f"({text},)"):
        try:
            value = ast.literal_eval(candidate)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return (value,)
        if isinstance(value, list | tuple):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return tuple(part.strip() for part in text.split(","))  # bare words, such as file names


def _unknown_option(
    name: str, options: Sequence[str], config: ml_collections.ConfigDict, other_names: Mapping[str, str]
) -> str:
    bare = name.lstrip("-").replace("-", "_")
    if name.startswith("-") and bare in other_names:
        return f"unknown option {name}; write {other_names[bare]}"
    if bare.replace(".", "_") in config:
        return f"unknown option {name}; did you mean --config.{bare}=VALUE?"
    if not name.startswith("-"):
        return f"unexpected argument {name!r}; options look like --config.KEY=VALUE (see --help)"
    near = closest(name, [*options, *(f"--{key}" for key in config)])
    if near is None:
        return f"unknown option {name}; known: {', '.join(options)}"
    return f"unknown option {name}; did you mean {near if near in options else f'--config.{near[2:]}=VALUE'}?"
