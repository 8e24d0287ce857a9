"""What one video is asked for, decided from the checkpoint and checked before anything is loaded. No jax import."""

from x2v_jax.request.request import Request
from x2v_jax.request.resolve import ResolvedRequest, resolve

__all__ = ["Request", "ResolvedRequest", "resolve"]
