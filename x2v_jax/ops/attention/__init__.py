"""Scaled dot-product attention."""

from x2v_jax.ops.attention.api import Implementation, attention
from x2v_jax.ops.attention.hopper_config import Precision
from x2v_jax.ops.attention.in_parts import ReadRows, RowsInPlace, attention_in_parts
from x2v_jax.ops.attention.quantized import query_dtype
from x2v_jax.ops.attention.spans import attention_by_spans
from x2v_jax.ops.attention.tiles import Span

__all__ = [
    "Implementation",
    "Precision",
    "ReadRows",
    "RowsInPlace",
    "Span",
    "attention",
    "attention_by_spans",
    "attention_in_parts",
    "query_dtype",
]
