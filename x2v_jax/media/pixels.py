"""The numbers that networks work with -> pixels."""

from typing import overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@overload
def to_uint8(video: np.ndarray) -> np.ndarray: ...
@overload
def to_uint8(video: Array) -> Array: ...
def to_uint8(video: np.ndarray | Array) -> np.ndarray | Array:
    """[-1, 1] -> 0..255, rounded to the nearest; what lies outside is clipped. NumPy arrays stay on the host.

    LightX2V and Wan2.1 truncate instead, which darkens by half a level on average; no value differs by more than one.

    >>> to_uint8(np.float32([-1, 0, 1.5]))
    array([  0, 128, 255], dtype=uint8)
    """
    xp = np if isinstance(video, np.ndarray) else jnp
    return xp.round((xp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(xp.uint8)
