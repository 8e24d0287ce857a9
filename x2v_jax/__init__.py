"""Few-step Wan2.1 video generation in JAX."""

from typing import TYPE_CHECKING

from x2v_jax.errors import UserError
from x2v_jax.shipped import VERSION

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline

__version__ = VERSION
__all__ = ["Pipeline", "UserError", "__version__"]


def __getattr__(name: str):
    # Lazy, so that `import x2v_jax` (and every command line's error message) does not wait for jax.
    if name == "Pipeline":
        from x2v_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
