"""Listening to what layers are given, for calibration: the largest magnitude of each channel, while a network runs.

A network is marked once, with `observe`, and says with `in_layer` which of its stacked layers is at work. Nothing is
compiled into its programs unless somebody listens while they are traced.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

# (place, layer, the largest magnitude of each channel [D], float32), in any order.
Listener = Callable[[str, int, np.ndarray], None]

_listener: Listener | None = None
# Of stacked layers, the number of the one that is being traced; it may be traced itself.
_layer: Any = 0
_one_at_a_time = threading.Lock()


def observe[T](place: str, x: T) -> T:
    """x itself. A listener is told the largest magnitude of each of its channels (last axis), NaN where there is one.

    Args:
        place: what it is called to the listener.
        x: [..., D], floats; anything where nobody listens.

    Raises:
        TypeError: somebody listens, and x is no array of floats: 8-bit rows have been scaled already.
    """
    if _listener is None:
        return x
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{place} is given {type(x).__name__}; only networks of floats can be listened to")
    # Not ordered: XLA passes no order through loops whose weights lie in the host's memory (jax 0.11).
    jax.debug.callback(functools.partial(_tell, place), _layer, _largest(x))
    return x


def is_listening() -> bool:
    """Whether somebody listens to what is traced now."""
    return _listener is not None


@contextlib.contextmanager
def in_layer(number: object) -> Iterator[None]:
    """A context of what is traced: this layer (from 0) is at work."""
    global _layer
    before, _layer = _layer, number
    try:
        yield
    finally:
        _layer = before


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A context in which `listener` is told of what networks are given that run within. It has heard all at the end.

    All compiled programs of this process are forgotten on the way in and out: one that was traced without the
    listener would tell it nothing, and one that was traced with it would go on calling the host.

    Raises:
        RuntimeError: somebody is listening already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("there is a listener already")
    jax.clear_caches()
    _listener = listener
    try:
        yield
        jax.effects_barrier()
    finally:
        _listener = None
        jax.clear_caches()


def _largest(x: Float[Array, "*b d"]) -> Float[Array, " d"]:
    return jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1))).astype(jnp.float32)


def _tell(place: str, layer: Int[ArrayLike, ""], largest: Float[ArrayLike, " d"]) -> None:
    # Programs may outlive the context in somebody's hands; they then speak to nobody.
    with _one_at_a_time:  # callbacks come on threads of jax
        if _listener is not None:
            _listener(place, int(np.asarray(layer)), np.asarray(largest, np.float32))
