"""Linear layers with 8-bit weights: `linear_8bit` and the quantizers."""

from x2v_jax.ops.linear_8bit.api import Activations, linear_8bit, quantize_rows
from x2v_jax.ops.linear_8bit.choose import Implementation
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, quantize_weight

__all__ = ["Activations", "Implementation", "QuantizedRows", "linear_8bit", "quantize_rows", "quantize_weight"]
