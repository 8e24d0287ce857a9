"""What one video is asked for, completed from the checkpoint and checked before anything is loaded. No jax import."""

from x2v_jax.request.request import Request

__all__ = ["Request"]
