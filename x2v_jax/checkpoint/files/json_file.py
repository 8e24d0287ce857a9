"""JSON objects and file names as a checkpoint may have them."""

import json
import pathlib
from typing import TypeGuard

from x2v_jax.errors import UserError


def is_plain_name(name: object) -> bool:
    """Whether `name` names a file directly in a folder, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def is_json_object(value: object) -> TypeGuard[dict[str, object]]:
    """Whether a value that JSON was parsed to is an object: its keys are strings then."""
    return type(value) is dict


def is_json_array(value: object) -> TypeGuard[list[object]]:
    """Whether a value that JSON was parsed to is an array."""
    return type(value) is list


def read_json(path: pathlib.Path) -> dict[str, object]:
    """A JSON object from a file of at most 64 MB.

    Raises:
        UserError: it cannot be read or is not a JSON object.
    """
    try:
        if path.stat().st_size > 64 << 20:
            raise UserError(f"{path}: larger than any JSON file of a checkpoint; give the right file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; download it again") from None
    if not is_json_object(content):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content
