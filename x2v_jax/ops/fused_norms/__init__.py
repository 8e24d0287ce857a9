"""Norms and the rotary embedding, alone and fused: with modulation and quantization, or with each other."""

from x2v_jax.ops.fused_norms.api import layernorm_modulate_quantize, rmsnorm_rope
from x2v_jax.ops.fused_norms.reference import layernorm_modulate, normalize, rms_normalize, rotate

__all__ = [
    "layernorm_modulate",
    "layernorm_modulate_quantize",
    "normalize",
    "rms_normalize",
    "rmsnorm_rope",
    "rotate",
]
