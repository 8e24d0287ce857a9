"""A request's noise, as a function of its key alone.

Every draw has its own key, derived with `fold_in` from the request's; nothing is split or advanced. So noise depends
neither on other requests nor on the order in which steps and blocks ask for it, nor on how many devices hold it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

# First fold: what the noise is for. The kinds of draw can then never meet, whatever step and block are.
_INITIAL, _STEP, _BLOCK = 0, 1, 2


def seed_key(seed: int) -> Key[Array, ""]:
    """The key of a seed of up to 64 bits: for one of 32 bits jax's own, which takes no more."""
    key = jax.random.key(np.uint32(seed & 0xFFFFFFFF))
    for word in (seed >> 32, 0xFFFFFFFF) if seed >> 32 else ():  # the second, since no draw below has such a number
        key = jax.random.fold_in(key, np.uint32(word))
    return key


def initial_noise(key: Key[Array, ""], shape: Sequence[int]) -> Float[Array, "..."]:
    """The standard normal float32 sample that a request starts from."""
    return jax.random.normal(jax.random.fold_in(key, _INITIAL), tuple(shape), jnp.float32)


def step_noise(key: Key[Array, ""], step: ArrayLike, shape: Sequence[int], block: ArrayLike = 0) -> Float[Array, "..."]:
    """The standard normal float32 noise that is added after denoising step `step` (from 0) of block `block`.

    `step` and `block` may be traced, so that one compiled function serves all of them.
    """
    for index in (_STEP, block, step):
        key = jax.random.fold_in(key, index)
    return jax.random.normal(key, tuple(shape), jnp.float32)


def block_noise(key: Key[Array, ""], block: ArrayLike, shape: Sequence[int]) -> Float[Array, "..."]:
    """The standard normal float32 sample that block `block` of a block-by-block video starts from. May be traced."""
    for index in (_BLOCK, block):
        key = jax.random.fold_in(key, index)
    return jax.random.normal(key, tuple(shape), jnp.float32)
