"""Scaled dot-product attention."""

from x2v_jax.ops.attention.api import attention
from x2v_jax.ops.attention.spans import Span, attention_by_spans

__all__ = ["Span", "attention", "attention_by_spans"]
