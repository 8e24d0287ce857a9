"""Scaled dot-product attention."""

from x2v_jax.ops.attention.api import attention
from x2v_jax.ops.attention.in_parts import ReadRows, attention_in_parts
from x2v_jax.ops.attention.spans import Span, attention_by_spans

__all__ = ["ReadRows", "Span", "attention", "attention_by_spans", "attention_in_parts"]
