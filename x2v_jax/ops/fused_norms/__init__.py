"""Norms fused with what follows them: modulation and quantization, or rotary embedding."""

from x2v_jax.ops.fused_norms.api import layernorm_modulate_quantize, rmsnorm_rope

__all__ = ["layernorm_modulate_quantize", "rmsnorm_rope"]
