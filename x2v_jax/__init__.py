"""Few-step Wan video generation in JAX.

The public names of the library:

- `Pipeline` makes videos with a checkpoint; `Result` is one video and how it came about, `Block` a piece of one.
- `Request` is what one video is asked for, `ResolvedRequest` what was decided of it.
- `write_video` writes an mp4 that carries its settings, `read_metadata` reads them.
- `UserError` is what a mistake raises: one sentence with the field, its value and the fix.
"""

import importlib
from typing import TYPE_CHECKING

from x2v_jax.errors import UserError
from x2v_jax.shipped import VERSION

if TYPE_CHECKING:
    from x2v_jax.generate.blocks import Block
    from x2v_jax.media.video import read_metadata, write_video
    from x2v_jax.pipeline import Pipeline, Result
    from x2v_jax.request import Request, ResolvedRequest

__version__ = VERSION
__all__ = [
    "Block",
    "Pipeline",
    "Request",
    "ResolvedRequest",
    "Result",
    "UserError",
    "__version__",
    "read_metadata",
    "write_video",
]

# Lazy, so that `import x2v_jax` (and every command line's error message) does not wait for jax.
_HOMES = {
    "Block": "x2v_jax.generate.blocks",
    "Pipeline": "x2v_jax.pipeline",
    "Request": "x2v_jax.request",
    "ResolvedRequest": "x2v_jax.request",
    "Result": "x2v_jax.pipeline",
    "read_metadata": "x2v_jax.media.video",
    "write_video": "x2v_jax.media.video",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
