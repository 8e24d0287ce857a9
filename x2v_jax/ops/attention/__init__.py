"""Scaled dot-product attention."""

from x2v_jax.ops.attention.api import attention

__all__ = ["attention"]
