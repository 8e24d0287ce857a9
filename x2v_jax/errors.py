"""The one exception that a user's mistake raises, and what its sentences and the checks before them share."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import TypeGuard


class UserError(ValueError):
    """A mistake in what the user gave. The message names the field, its value and the fix.

    Command lines print it as one sentence and exit with code 2; no traceback.
    """


def did_you_mean(word: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """The advice after a word that is none of the known ones.

    >>> did_you_mean("widht", ["width", "height"], "known: width, height")
    'did you mean width?'

    Args:
        otherwise: what is said where nothing known is near.
        cutoff: how alike words must be, 0 to 1; see `difflib.get_close_matches`.
    """
    near = closest(word, known, cutoff)
    return otherwise if near is None else f"did you mean {near}?"


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like another; None where none is alike."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a finite number; True and False are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False
