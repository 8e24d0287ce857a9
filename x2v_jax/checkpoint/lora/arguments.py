"""A LoRA as a user gives it, on a command line, in a config or in Python: a file, and the strength of its change."""

import math
import os
from typing import Any

from x2v_jax.checkpoint.lora.read import SUFFIXES
from x2v_jax.errors import UserError, is_number

# A file, or a file and the strength that it is merged with.
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


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
    if not isinstance(path, str | os.PathLike):
        raise UserError(f'{field} holds {entry!r}; give pairs such as (("file.safetensors", 1.0),)')
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
