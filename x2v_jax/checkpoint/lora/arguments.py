"""A LoRA as a user gives it, on a command line, in a config or in Python: a file, and the strength of its change."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from x2v_jax.checkpoint.lora.read import SUFFIXES
from x2v_jax.errors import UserError, is_number

# A file, or a file and the strength that it is merged with.
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
# One of them or several, as a list, or as a dict of file -> strength.
Loras = Lora | Sequence[Lora] | Mapping[str, float] | Mapping[os.PathLike[str], float]

_FORMS = 'give a file, a (file, strength) pair, a list of either, or a dict such as {"file.safetensors": 0.8}'
# Names that published LoRAs have which make a model of many steps one of few.
_DISTILLS = re.compile(r"distill|causvid|self[-_]?forcing|(?<![a-z])(?:dmd|lcm)|\d[-_]?steps?(?![a-z])", re.IGNORECASE)


def lora_pairs(loras: object, field: str = "loras", *, typed: bool = False) -> tuple[tuple[str, float], ...]:
    """Every form of `Loras` as (file, strength) pairs.

    >>> lora_pairs({"turbo.safetensors": 0.3})
    (('turbo.safetensors', 0.3),)
    >>> lora_pairs(("turbo.safetensors", 0.3)) == lora_pairs([("turbo.safetensors", 0.3)])
    True
    >>> lora_pairs("turbo.safetensors:0.3", typed=True)
    (('turbo.safetensors', 0.3),)

    Args:
        field: what sentences call it.
        typed: for values of a command line, where a text may say FILE:STRENGTH and a strength may be a text.

    Raises:
        UserError: it is none of these forms.
    """
    if loras is None:
        return ()
    if isinstance(loras, Mapping):
        return tuple(lora_pair(pair, field) for pair in loras.items())  # type: ignore[misc]  # of whatever types
    if isinstance(loras, str | os.PathLike) or not isinstance(loras, Sequence):
        return (_one(loras, field, typed),)
    entries = list(loras)  # type: ignore[arg-type]  # of whatever is in it
    if _is_pair(entries, typed):
        return (lora_pair((entries[0], float(entries[1])), field),)  # type: ignore[arg-type]  # a number or its text
    found: list[tuple[str, float]] = []
    for entry in entries:
        found += lora_pairs(entry, field) if isinstance(entry, Mapping) else [_one(entry, field, typed)]
    return tuple(found)


def _one(entry: object, field: str, typed: bool) -> tuple[str, float]:
    return parse_lora_argument(entry) if typed and isinstance(entry, str) else lora_pair(entry, field)


def _is_pair(entries: Sequence[object], typed: bool) -> bool:
    """Whether a list is one file and its strength, and not two files."""
    if len(entries) != 2 or not isinstance(entries[0], str | os.PathLike):
        return False
    second = entries[1]
    if is_number(second):
        return True
    return typed and isinstance(second, str) and _number(second) is not None and not os.path.exists(second)


def distilling(loras: Sequence[tuple[str, float]]) -> str:
    """The first LoRA whose name says that it makes a model one of few steps; "" where none does.

    >>> distilling([("style.safetensors", 1.0), ("loras/wan_cfg_step_distill_rank32.safetensors", 1.0)])
    'loras/wan_cfg_step_distill_rank32.safetensors'
    """
    return next((path for path, strength in loras if strength and _DISTILLS.search(os.path.basename(path))), "")


def lora_pair(entry: Any, field: str = "lora") -> tuple[str, float]:
    """(file, strength) of an entry: a file, whose strength is 1, or a pair.

    >>> lora_pair("turbo.safetensors")
    ('turbo.safetensors', 1.0)

    Args:
        field: what sentences call it.

    Raises:
        UserError: it is neither, or the strength is no finite number.
    """
    path, strength = entry if isinstance(entry, tuple | list) and len(entry) == 2 else (entry, 1.0)
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(f"{field} holds {entry!r}; {_FORMS}")
    if not is_number(strength):
        raise UserError(f"{field}: the strength of {os.fspath(path)} is {strength!r}; give a number")
    return os.fspath(path), float(strength)


def parse_lora_argument(text: str) -> tuple[str, float]:
    """Reads a command line's `FILE[:STRENGTH]`; the strength is 1 where it is left out.

    A colon that belongs to the path (a Windows drive, or a file that exists under the whole name) is left alone.

    Raises:
        UserError: no file, or a strength that is no finite number.

    >>> parse_lora_argument("turbo.safetensors:0.8")
    ('turbo.safetensors', 0.8)
    >>> parse_lora_argument(r"C:\\loras\\turbo.safetensors")
    ('C:\\\\loras\\\\turbo.safetensors', 1.0)
    """
    path, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(text):
        path, tail = text, "1"
    elif not path.lower().endswith(SUFFIXES) and _number(tail) is None:
        path, tail = text, "1"  # the colon is part of the path
    strength = _number(tail)
    if not path:
        raise UserError(f"lora: {text!r} names no file; write FILE or FILE:STRENGTH")
    if strength is None or not math.isfinite(strength):
        raise UserError(f"lora: strength {tail!r} of {path!r} is not a finite number; write for instance {path}:0.8")
    return path, strength


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
