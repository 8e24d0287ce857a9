"""Sentences about single fields of a request: their types, ranges and choices. No jax import."""

import math
import operator
from collections.abc import Sequence
from typing import Any


def as_config(cls: type, value: object) -> Any:
    return value if isinstance(value, cls) else cls.from_dict(value)


def whole_problems(request: object, name: str, low: int, high: int) -> list[str]:
    value = getattr(request, name)
    if value is None:
        return []
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        return [f"{name} is {value!r}; give a whole number"]
    return [] if low <= number <= high else [f"{name} is {number}; give a whole number from {low} to {high}"]


def real_problems(request: object, name: str, low: float, high: float) -> list[str]:
    value = getattr(request, name)
    if value is None:
        return []
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return [] if low <= number <= high else [f"{name} is {value!r}; give a number from {low:g} to {high:g}"]


def choice_problems(request: object, name: str, choices: Sequence[str]) -> list[str]:
    value = getattr(request, name)
    if value is None or value in choices:
        return []
    return [f"{name} is {value!r}; give one of {', '.join(repr(choice) for choice in choices)}"]
