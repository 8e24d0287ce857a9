"""CLIP's visual tower (ViT-H/14): an image -> the features that image-to-video attends to.

Source: Wan2.1 wan/modules/clip.py (VisionTransformer with use_31_block). Wan takes the token features that enter the
last block; that block, the norm after it and the head are parameters all the same, so that files round-trip.
Matmuls run in `dtype`; the residual stream, norms and softmax are float32.
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.models.config import ClipConfig
from x2v_jax.models.layers import LayerNorm, Quantization, linear, scan_blocks, stacked
from x2v_jax.ops.attention import attention
from x2v_jax.ops.choice import DEFAULT_OPS, OpChoice

Tokens = Float[Array, "b l d"]


class _Attention(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, **options: Any):
        self.to_qkv = linear(config.dim, 3 * config.dim, rngs=rngs, **options)
        self.proj = linear(config.dim, config.dim, rngs=rngs, **options)
        self.num_heads = config.num_heads

    def __call__(self, x: Tokens) -> Tokens:
        qkv = self.to_qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        y = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(y.reshape(x.shape))


class _Mlp(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, **options: Any):
        self.linear_1 = linear(config.dim, config.mlp_ratio * config.dim, rngs=rngs, **options)
        self.linear_2 = linear(config.mlp_ratio * config.dim, config.dim, rngs=rngs, **options)

    def __call__(self, x: Tokens) -> Tokens:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class _Block(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, **options: Any):
        self.norm1 = LayerNorm(config.dim, eps=config.eps, param_dtype=options["param_dtype"])
        self.attn = _Attention(config, rngs=rngs, **options)
        self.norm2 = LayerNorm(config.dim, eps=config.eps, param_dtype=options["param_dtype"])
        self.mlp = _Mlp(config, rngs=rngs, **options)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.attn(self.norm1(x)).astype(jnp.float32)
        return x + self.mlp(self.norm2(x)).astype(jnp.float32)


class _PatchEmbedding(nnx.Module):
    """Square patches -> tokens. kernel: [patch, patch, 3, dim], as the published convolution (which has no bias)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        shape = (config.patch_size, config.patch_size, 3, config.dim)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal(in_axis=(0, 1, 2))(rngs.params(), shape, param_dtype))
        self.dtype = dtype

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Tokens:
        kernel = self.kernel[...].astype(self.dtype)
        patch = kernel.shape[0]
        # Patches do not overlap, so the convolution is one matmul.
        patches = einops.rearrange(pixels, "b (y ph) (x pw) c -> b (y x) (ph pw c)", ph=patch, pw=patch)
        return patches.astype(self.dtype) @ kernel.reshape(-1, kernel.shape[-1])


class ClipVisionTower(nnx.Module):
    """CLIP's visual tower.

    Parameters: cls_embedding, pos_embedding, patch_embedding, pre_norm, blocks (every leaf with a leading layer axis),
    post_norm, head.

    Args:
        config: sizes.
        rngs: where new parameters come from.
        dtype: dtype of the matmuls.
        param_dtype: dtype of new parameters.
        quantization: what the blocks' matrices are stored as; such a model is to be filled from a checkpoint.
        ops: who computes 8-bit matmuls. Attention, of 257 tokens, is left to "auto".
    """

    def __init__(
        self,
        config: ClipConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        quantization: Quantization = None,
        ops: OpChoice = DEFAULT_OPS,
    ):
        options: dict[str, Any] = {
            "dtype": dtype, "param_dtype": param_dtype, "quantization": quantization, "ops": ops
        }  # fmt: skip
        num_tokens = 1 + (config.image_size // config.patch_size) ** 2
        normal = nnx.initializers.normal(stddev=config.dim**-0.5)
        self.cls_embedding = nnx.Param(normal(rngs.params(), (config.dim,), param_dtype))
        self.pos_embedding = nnx.Param(normal(rngs.params(), (num_tokens, config.dim), param_dtype))
        self.patch_embedding = _PatchEmbedding(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.pre_norm = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.blocks = stacked(lambda rngs: _Block(config, rngs=rngs, **options), config.num_layers, rngs)
        self.post_norm = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.head = nnx.Param(normal(rngs.params(), (config.dim, config.out_dim), param_dtype))
        self.config = config

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Tokens:
        """Encodes images.

        Args:
            pixels: normalised as CLIP's training was (`diffusion.image_condition.clip_pixels`), of the config's size.

        Returns:
            float32 [B, 1 + patches, D]: the class token, then the patches row by row, before the last block.
        """
        patches = self.patch_embedding(pixels).astype(jnp.float32)
        cls = jnp.broadcast_to(self.cls_embedding[...].astype(jnp.float32), (patches.shape[0], 1, patches.shape[2]))
        x = jnp.concatenate([cls, patches], axis=1) + self.pos_embedding[...].astype(jnp.float32)[None]
        return scan_blocks(self.blocks, self.pre_norm(x), lambda block, x: block(x), last=self.config.num_layers - 1)
