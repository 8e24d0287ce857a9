"""Wan2.1's diffusion transformer: noisy latents, timestep and text (and an image) -> flow velocity.

Source: Wan2.1 wan/modules/model.py. Matmuls run in `dtype`; the residual stream, norms, modulation, time embedding,
rotary angles and softmax are float32.

The same weights serve three ways of attending: in both directions, block-causal over a whole clip (training), and
block by block with the keys and values of earlier frames from a cache (Self-Forcing wan/modules/causal_model.py).
"""

import math
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import broadcast_to_rank
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from x2v_jax.models.activation_stats import in_layer, is_listening
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.host_blocks import lie_on_host, map_from_host
from x2v_jax.models.layers import LayerNorm, Linear, Quantization, Remat, scan_blocks, stacked
from x2v_jax.models.rope import rope_tables, rope_tables_at
from x2v_jax.models.wan_blocks import Block, CrossKeys, KeyValueCache, Mlp, Tokens, modulation_init, modulation_parts
from x2v_jax.ops.attention import Span
from x2v_jax.ops.choice import DEFAULT_OPS, OpChoice
from x2v_jax.ops.fused_norms import layernorm_modulate

# torch's nn.LayerNorm default; the rest of the model uses 1e-6.
_IMAGE_EMBEDDING_EPS = 1e-5


class _ImageEmbedding(nnx.Module):
    """CLIP features -> tokens of the model's width."""

    def __init__(self, features: int, out: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.norm_1 = LayerNorm(features, eps=_IMAGE_EMBEDDING_EPS, param_dtype=dtypes["param_dtype"])
        self.linear_1 = Linear(features, features, rngs=rngs, **dtypes)
        self.linear_2 = Linear(features, out, rngs=rngs, **dtypes)
        self.norm_2 = LayerNorm(out, eps=_IMAGE_EMBEDDING_EPS, param_dtype=dtypes["param_dtype"])

    def __call__(self, x: Tokens) -> Tokens:
        return self.norm_2(self.linear_2(jax.nn.gelu(self.linear_1(self.norm_1(x)), approximate=False)))


class _PatchEmbedding(nnx.Module):
    """Patches of the latents -> tokens. kernel: [pt, ph, pw, channels, dim], as the published convolution."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        shape = (*config.patch_size, config.in_dim, config.dim)
        flat = nnx.initializers.xavier_uniform()(rngs.params(), (math.prod(shape[:-1]), config.dim), param_dtype)
        self.kernel = nnx.Param(flat.reshape(shape))
        self.bias = nnx.Param(jnp.zeros((config.dim,), param_dtype))

    def __call__(self, patches: Tokens) -> Tokens:
        kernel = self.kernel[...].astype(jnp.float32)
        y = patches @ kernel.reshape(-1, kernel.shape[-1])
        return y + broadcast_to_rank(self.bias[...].astype(jnp.float32), y.ndim)


class _Head(nnx.Module):
    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        out = math.prod(config.patch_size) * config.out_dim
        self.modulation = nnx.Param(modulation_init(rngs, 2, config.dim, param_dtype))
        self.linear = Linear(config.dim, out, rngs=rngs, dtype=jnp.float32, param_dtype=param_dtype)
        # A new model predicts zero velocity, as the published initialisation has it.
        self.linear.kernel[...] = jnp.zeros_like(self.linear.kernel[...])
        self.eps = config.eps

    def __call__(self, x: Tokens, time: Float[Array, "b *f _"]) -> Tokens:
        shift, scale = modulation_parts(self.modulation, time[..., None, :], x.shape[1])
        return self.linear(layernorm_modulate(x, shift, scale, self.eps))


class WanModel(nnx.Module):
    """The transformer for text-to-video and image-to-video, every Wan2.1 size."""

    def __init__(
        self,
        config: WanConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        quantization: Quantization = None,
        smoothed: bool = False,
        ops: OpChoice = DEFAULT_OPS,
    ):
        """A new model.

        Args:
            dtype: of the matmuls and of attention.
            param_dtype: of the parameters.
            remat: what gradients keep of each block; see `layers.scan_blocks`.
            quantization: what the blocks' matrices are stored as; such a model is to be filled from a checkpoint.
            smoothed: whether the matrices' columns were multiplied by factors that the blocks undo; see `Block`.
            ops: who computes attention and 8-bit matmuls.
        """
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        exact: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": param_dtype}
        dim = config.dim
        self.config = config
        self.remat: Remat = remat
        self.patch_embedding = _PatchEmbedding(config, rngs=rngs, param_dtype=param_dtype)
        self.text_embedding = Mlp((config.text_dim, dim, dim), jax.nn.gelu, rngs=rngs, **dtypes)
        self.time_embedding = Mlp((config.freq_dim, dim, dim), jax.nn.silu, rngs=rngs, **exact)
        self.time_projection = Linear(dim, 6 * dim, rngs=rngs, **exact)
        if config.model_type == "i2v":
            self.img_emb = _ImageEmbedding(config.clip_dim, dim, rngs=rngs, **dtypes)
        self.blocks = stacked(
            lambda rngs: Block(config, rngs=rngs, quantization=quantization, smoothed=smoothed, ops=ops, **dtypes),
            config.num_layers,
            rngs,
        )
        self.head = _Head(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b *f"],
        text: Float[Array, "b l t"],
        image_features: Float[Array, "b n i"] | None = None,
        *,
        causal: CausalPattern | None = None,
    ) -> Float[Array, "b f h w o"]:
        """One evaluation of the velocity field.

        Args:
            latents: noisy latents; for image-to-video with the mask (4) and the image's latents (16) behind the noise
                (16) on channels. h and w are even.
            timestep: 1000 sigma, not rounded; [B], or [B, F] for a noise level in each frame.
            text: text embeddings, zero-padded to the model's text_len; all rows are attended.
            image_features: CLIP features, image-to-video only.
            causal: which earlier frames a frame attends to; None: all frames attend to all.

        Returns:
            velocity = noise - x0, float32.
        """
        x, time, block_time, grid = self._embed(latents, timestep)
        text = self.text_embedding(text)
        image = self._embed_image(image_features)
        rope = rope_tables(grid, self.config.head_dim)
        spans = None if causal is None else _spans(causal, grid)
        x = _scan(self.blocks, x, lambda block, x: block(x, block_time, text, image, rope, spans), remat=self.remat)
        return _unpatchify(self.head(x, time), grid, self.config.patch_size)

    def cross_keys(self, text: Float[Array, "b l t"], image_features: Float[Array, "b n i"] | None = None) -> CrossKeys:
        """What `with_cache` attends to besides frames: [layers, B, N, H, D]. Computed once a prompt."""
        text, image = self.text_embedding(text), self._embed_image(image_features)
        graphdef, params = nnx.split(self.blocks.cross_attn)
        keys = lambda layer: nnx.merge(graphdef, layer).keys(text, image)  # noqa: E731
        return map_from_host(keys, params) if lie_on_host(self.blocks) else jax.lax.map(keys, params)

    def with_cache[Cache: KeyValueCache](
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b *f"],
        context: CrossKeys,
        cache: Cache,
        start_frame: Int[Array, ""],
    ) -> tuple[Float[Array, "b f h w o"], Cache]:
        """The velocity of one block of frames that attends to itself and to the earlier frames in the cache.

        Args:
            latents, timestep: of the block, as in `__call__`.
            context: from `cross_keys`.
            cache: is given the keys and values of this block in every layer; called again at the same start_frame, it
                has those of the last call. It is carried through the layers, never stacked or unstacked.
            start_frame: position of the block's first frame; may be traced.

        Returns:
            (velocity, float32; the cache with this block in it).
        """
        x, time, block_time, grid = self._embed(latents, timestep)
        rope = rope_tables_at(start_frame + jnp.arange(grid[0]), grid[1:], self.config.head_dim)
        end_frame = start_frame + grid[0]

        def apply(block: Block, carry: PyTree[Array], inputs: PyTree[Array]) -> PyTree[Array]:
            (x, cache), (layer, keys) = carry, inputs
            return block.with_cache(x, block_time, keys, rope, cache, layer, start_frame, end_frame)

        inputs = (jnp.arange(self.config.num_layers), context)
        x, cache = _scan(self.blocks, (x, cache), apply, inputs=inputs)
        return _unpatchify(self.head(x, time), grid, self.config.patch_size), cache

    def after_frames(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b *f"],
        context: CrossKeys,
        keys: Float[Array, "n b t heads head_dim"],
        values: Float[Array, "n b t heads head_dim"],
        start_frame: Int[Array, ""],
        rows: Int[Array, ""],
    ) -> Float[Array, "b f h w o"]:
        """What `with_cache` says, for training: earlier frames are constant and nothing is written.

        A gradient then stores no copies of the cache, and goes through this block of frames alone.

        Args:
            keys, values: of every layer: those of the frames that are seen in the first `rows` rows, then room for this
                block's.
            start_frame: position of the block's first frame.
        """
        x, time, block_time, grid = self._embed(latents, timestep)
        rope = rope_tables_at(start_frame + jnp.arange(grid[0]), grid[1:], self.config.head_dim)

        def apply(block: Block, x: PyTree[Array], layer: PyTree[Array]) -> PyTree[Array]:
            return block.after(x, block_time, layer[0], rope, layer[1], layer[2], rows)

        x = _scan(self.blocks, x, apply, inputs=(context, keys, values), remat=self.remat)
        return _unpatchify(self.head(x, time), grid, self.config.patch_size)

    def _embed(self, latents: Array, timestep: Array) -> tuple[Tokens, Array, Array, tuple[int, int, int]]:
        """(tokens, time [B, *F, D], time of the blocks [B, *F, 6, D], (frames, rows, columns) of the tokens)."""
        if timestep.ndim == 2 and (timestep.shape[1] != latents.shape[1] or self.config.patch_size[0] != 1):
            raise ValueError(f"timesteps of shape {timestep.shape} for latents of shape {latents.shape}")
        grid = _patch_grid(latents.shape, self.config.patch_size)
        x = self.patch_embedding(_patchify(latents.astype(jnp.float32), self.config.patch_size))
        time = self.time_embedding(timestep_embedding(timestep.ravel(), self.config.freq_dim))
        time = time.reshape(*timestep.shape, -1)
        block_time = self.time_projection(jax.nn.silu(time)).reshape(*timestep.shape, 6, self.config.dim)
        return x, time, block_time, grid

    def _embed_image(self, features: Array | None) -> Tokens | None:
        if (self.config.model_type == "i2v") != (features is not None):
            raise ValueError(f"a {self.config.model_type} model takes image_features only if it is i2v")
        return None if features is None else self.img_emb(features)


def _scan(blocks: Any, x: Any, apply: Any, *, inputs: Any = None, **options: Any) -> Any:
    """`layers.scan_blocks`. Where somebody listens, each block says its number."""
    if not is_listening():
        return scan_blocks(blocks, x, apply, inputs=inputs, **options)

    def numbered(block: Block, x: Any, given: Any) -> Any:
        number, own = given
        with in_layer(number):
            return apply(block, x) if inputs is None else apply(block, x, own)

    layers = blocks.modulation[...].shape[0]
    return scan_blocks(blocks, x, numbered, inputs=(jnp.arange(layers), inputs), **options)


def timestep_embedding(timestep: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """cos then sin of timestep * 10000^(-i / (dim/2)), float32."""
    half = dim // 2
    frequencies = jnp.asarray(10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _spans(causal: CausalPattern, grid: tuple[int, int, int]) -> list[Span]:
    tokens = grid[1] * grid[2]
    spans = []
    for start, stop in causal.blocks(grid[0]):
        sink, first = causal.visible(stop)
        spans.append(Span(start * tokens, stop * tokens, first * tokens, stop * tokens, sink * tokens))
    return spans


def _patch_grid(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    if any(size % p for size, p in zip(shape[1:4], patch, strict=True)):
        raise ValueError(f"latents of {shape[1:4]} frames, rows, columns do not split into patches of {patch}")
    f, h, w = (size // p for size, p in zip(shape[1:4], patch, strict=True))
    return f, h, w


def _patchify(x: Array, patch: tuple[int, int, int]) -> Tokens:
    (f, h, w), (pt, ph, pw) = _patch_grid(x.shape, patch), patch
    pattern = "b (f pt) (h ph) (w pw) c -> b (f h w) (pt ph pw c)"
    return einops.rearrange(x, pattern, f=f, h=h, w=w, pt=pt, ph=ph, pw=pw)


def _unpatchify(x: Tokens, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    (f, h, w), (pt, ph, pw) = grid, patch
    pattern = "b (f h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c"
    return einops.rearrange(x, pattern, f=f, h=h, w=w, pt=pt, ph=ph, pw=pw)
