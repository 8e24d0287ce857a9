"""The run-time check of the library's annotations: shapes by jaxtyping, types by beartype. In pytest only."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# An int is a float to the type checker and to arithmetic, so it is here.
_CONFIG = BeartypeConf(is_pep484_tower=True)
# What these hold is what a user wrote; they say themselves, in a sentence, what is wrong with it.
CHECKED_IN_SENTENCES = {
    "Request.__init__", "RunOptions.__init__", "RolloutPlan.__init__",
    "SafetensorsWriter.__init__", "write_torch_file", "step_sigmas", "check_shift", "unipc_schedule",
}  # fmt: skip
# Trees, which jax also builds of shapes, shardings and placeholders: they are checked where they hold arrays.
TREES = {"KVCache.__init__", "EightBit.__init__"}


def checked[F: Callable[..., Any]](function: F) -> F:
    """`function` with its arguments and result checked on each call.

    Functions are wrapped one by one, before their class exists, so `Self` stands here for the class that the method was
    written in, which beartype looks up by its name on the first call.
    """
    if not inspect.isfunction(function):
        return beartype(function, conf=_CONFIG)
    if function.__qualname__ in CHECKED_IN_SENTENCES:
        return function
    own_class = function.__qualname__.rpartition(".")[0]
    for name, hint in function.__annotations__.items():
        function.__annotations__[name] = own_class if hint is Self else hint
    strict = beartype(function, conf=_CONFIG)
    return _of_arrays(function, strict) if function.__qualname__ in TREES else strict


def _of_arrays(function: Callable[..., Any], strict: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def check(self: Any, *fields: Any, **named: Any) -> Any:
        import jax

        leaves = jax.tree.leaves((fields, named))
        return (strict if all(isinstance(leaf, jax.Array) for leaf in leaves) else function)(self, *fields, **named)

    return check


def install() -> None:
    """Checks every function and dataclass of the library's modules that are imported from now on."""
    install_import_hook("x2v_jax", f"{__name__}.{checked.__name__}")
