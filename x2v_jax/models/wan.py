"""Wan2.1's diffusion transformer: noisy latents, timestep and text (and an image) -> flow velocity.

Source: Wan2.1 wan/modules/model.py. Matmuls run in `dtype`; the residual stream, norms, modulation, time embedding,
rotary angles and softmax are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.models.config import WanConfig
from x2v_jax.models.layers import LayerNorm, Linear, RMSNorm, normalize, scan_blocks, stacked
from x2v_jax.models.rope import RopeTables, apply_rope, rope_tables
from x2v_jax.ops.attention import attention

Tokens = Float[Array, "b l d"]

# torch's nn.LayerNorm default; the rest of the model uses 1e-6.
_IMAGE_EMBEDDING_EPS = 1e-5


class _Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, sizes: tuple[int, int, int], activation: Any, *, rngs: nnx.Rngs, **dtypes: Any):
        self.linear_1 = Linear(sizes[0], sizes[1], rngs=rngs, **dtypes)
        self.linear_2 = Linear(sizes[1], sizes[2], rngs=rngs, **dtypes)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class _ImageEmbedding(nnx.Module):
    """CLIP features -> tokens of the model's width."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.norm_1 = LayerNorm(features, eps=_IMAGE_EMBEDDING_EPS, param_dtype=dtypes["param_dtype"])
        self.linear_1 = Linear(features, features, rngs=rngs, **dtypes)
        self.linear_2 = Linear(features, out, rngs=rngs, **dtypes)
        self.norm_2 = LayerNorm(out, eps=_IMAGE_EMBEDDING_EPS, param_dtype=dtypes["param_dtype"])

    def __call__(self, x: Tokens) -> Tokens:
        return self.norm_2(self.linear_2(jax.nn.gelu(self.linear_1(self.norm_1(x)), approximate=False)))


class _Attention(nnx.Module):
    """Projections and query/key norms that self and cross attention share."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        for name in ("q", "k", "v", "o"):
            setattr(self, name, Linear(config.dim, config.dim, rngs=rngs, **dtypes))
        self.norm_q = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])
        self.norm_k = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])
        self.num_heads = config.num_heads
        self.dtype = dtypes["dtype"]

    def heads(self, x: Tokens) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1).astype(self.dtype)

    def project_out(self, y: Array) -> Tokens:
        return self.o(y.reshape(*y.shape[:2], -1))


class SelfAttention(_Attention):
    def __call__(self, x: Tokens, rope: RopeTables) -> Tokens:
        q = apply_rope(self.norm_q(self.q(x)).reshape(*x.shape[:2], self.num_heads, -1), rope)
        k = apply_rope(self.norm_k(self.k(x)).reshape(*x.shape[:2], self.num_heads, -1), rope)
        return self.project_out(attention(q.astype(self.dtype), k.astype(self.dtype), self.heads(self.v(x))))


class CrossAttention(_Attention):
    """Attention to the text, and for image-to-video to the image with keys and values of its own; the two are summed.

    The padding of the text is attended too: the published models were trained without a mask.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        super().__init__(config, rngs=rngs, **dtypes)
        self.has_image = config.model_type == "i2v"
        if self.has_image:
            self.k_img = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
            self.v_img = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])

    def __call__(self, x: Tokens, text: Tokens, image: Tokens | None) -> Tokens:
        q = self.heads(self.norm_q(self.q(x)))
        y = attention(q, self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))
        if self.has_image:
            y = y + attention(q, self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image)))
        return self.project_out(y)


class Block(nnx.Module):
    """Self attention, cross attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        param_dtype = dtypes["param_dtype"]
        self.modulation = nnx.Param(_modulation_init(rngs, 6, config.dim, param_dtype))
        self.self_attn = SelfAttention(config, rngs=rngs, **dtypes)
        self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.cross_attn = CrossAttention(config, rngs=rngs, **dtypes)
        self.ffn = _Mlp((config.dim, config.ffn_dim, config.dim), jax.nn.gelu, rngs=rngs, **dtypes)
        self.eps = config.eps

    def __call__(
        self, x: Tokens, time: Float[Array, "b 6 d"], text: Tokens, image: Tokens | None, rope: RopeTables
    ) -> Tokens:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(_modulated(self.modulation, time), 6, axis=1)
        y = self.self_attn(normalize(x, self.eps) * (1 + scale_1) + shift_1, rope)
        x = x + y.astype(jnp.float32) * gate_1
        x = x + self.cross_attn(self.norm3(x), text, image).astype(jnp.float32)
        y = self.ffn(normalize(x, self.eps) * (1 + scale_2) + shift_2)
        return x + y.astype(jnp.float32) * gate_2


class _PatchEmbedding(nnx.Module):
    """Patches of the latents -> tokens. kernel: [pt, ph, pw, channels, dim], as the published convolution."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        shape = (*config.patch_size, config.in_dim, config.dim)
        flat = nnx.initializers.xavier_uniform()(rngs.params(), (_product(shape[:-1]), config.dim), param_dtype)
        self.kernel = nnx.Param(flat.reshape(shape))
        self.bias = nnx.Param(jnp.zeros((config.dim,), param_dtype))

    def __call__(self, patches: Tokens) -> Tokens:
        kernel = self.kernel[...].astype(jnp.float32)
        return patches @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(jnp.float32)


class _Head(nnx.Module):
    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        out = _product(config.patch_size) * config.out_dim
        self.modulation = nnx.Param(_modulation_init(rngs, 2, config.dim, param_dtype))
        self.linear = Linear(config.dim, out, rngs=rngs, dtype=jnp.float32, param_dtype=param_dtype)
        # A new model predicts zero velocity, as the published initialisation has it.
        self.linear.kernel[...] = jnp.zeros_like(self.linear.kernel[...])
        self.eps = config.eps

    def __call__(self, x: Tokens, time: Float[Array, "b d"]) -> Tokens:
        shift, scale = jnp.split(_modulated(self.modulation, time[:, None]), 2, axis=1)
        return self.linear(normalize(x, self.eps) * (1 + scale) + shift)


class WanModel(nnx.Module):
    """The transformer for text-to-video and image-to-video, every Wan2.1 size."""

    def __init__(
        self,
        config: WanConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        exact: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": param_dtype}
        dim = config.dim
        self.config = config
        self.patch_embedding = _PatchEmbedding(config, rngs=rngs, param_dtype=param_dtype)
        self.text_embedding = _Mlp((config.text_dim, dim, dim), jax.nn.gelu, rngs=rngs, **dtypes)
        self.time_embedding = _Mlp((config.freq_dim, dim, dim), jax.nn.silu, rngs=rngs, **exact)
        self.time_projection = Linear(dim, 6 * dim, rngs=rngs, **exact)
        if config.model_type == "i2v":
            self.img_emb = _ImageEmbedding(config.clip_dim, dim, rngs=rngs, **dtypes)
        self.blocks = stacked(lambda rngs: Block(config, rngs=rngs, **dtypes), config.num_layers, rngs)
        self.head = _Head(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        text: Float[Array, "b l t"],
        image_features: Float[Array, "b n i"] | None = None,
    ) -> Float[Array, "b f h w o"]:
        """One evaluation of the velocity field.

        Args:
            latents: noisy latents; for image-to-video with the mask (4) and the image's latents (16) behind the noise
                (16) on channels. h and w are even.
            timestep: 1000 sigma, not rounded.
            text: text embeddings, zero-padded to the model's text_len; all rows are attended.
            image_features: CLIP features, image-to-video only.

        Returns:
            velocity = noise - x0, float32.
        """
        grid = _patch_grid(latents.shape, self.config.patch_size)
        x = self.patch_embedding(_patchify(latents.astype(jnp.float32), self.config.patch_size))
        time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))
        block_time = self.time_projection(jax.nn.silu(time)).reshape(-1, 6, self.config.dim)
        text = self.text_embedding(text)
        image = self._embed_image(image_features)
        rope = rope_tables(grid, self.config.head_dim)
        x = scan_blocks(self.blocks, x, lambda block, x: block(x, block_time, text, image, rope))
        return _unpatchify(self.head(x, time), grid, self.config.patch_size)

    def _embed_image(self, features: Array | None) -> Tokens | None:
        if (self.config.model_type == "i2v") != (features is not None):
            raise ValueError(f"a {self.config.model_type} model takes image_features only if it is i2v")
        return None if features is None else self.img_emb(features)


def timestep_embedding(timestep: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """cos then sin of timestep * 10000^(-i / (dim/2)), float32."""
    half = dim // 2
    frequencies = jnp.asarray(10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _modulated(modulation: nnx.Param, time: Array) -> Array:
    return modulation[...].astype(jnp.float32) + time.astype(jnp.float32)


def _modulation_init(rngs: nnx.Rngs, parts: int, dim: int, param_dtype: DTypeLike) -> Array:
    return jax.random.normal(rngs.params(), (parts, dim), param_dtype) / dim**0.5


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _patch_grid(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    if any(size % p for size, p in zip(shape[1:4], patch, strict=True)):
        raise ValueError(f"latents of {shape[1:4]} frames, rows, columns do not split into patches of {patch}")
    f, h, w = (size // p for size, p in zip(shape[1:4], patch, strict=True))
    return f, h, w


def _patchify(x: Array, patch: tuple[int, int, int]) -> Tokens:
    b, c = x.shape[0], x.shape[-1]
    (f, h, w), (pt, ph, pw) = _patch_grid(x.shape, patch), patch
    x = x.reshape(b, f, pt, h, ph, w, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, f * h * w, pt * ph * pw * c)


def _unpatchify(x: Tokens, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    (f, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], f, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], f * pt, h * ph, w * pw, -1)
