"""UMT5 encoder: token ids -> text features for the diffusion transformer's cross attention.

Source: Wan2.1 wan/modules/t5.py (T5Encoder with shared_pos=False) and Chung et al., "UniMax" (2023). What differs from
a usual transformer: no 1/sqrt(head_dim) on the logits, no biases, RMS norms, and in every layer a table of its own
of relative-position biases. Matmuls run in `dtype`; the residual stream, norms, biases and softmax are float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from x2v_jax.models.config import Umt5Config
from x2v_jax.models.layers import Linear, Quantization, RMSNorm, linear, scan_blocks, stacked
from x2v_jax.ops.choice import DEFAULT_OPS, OpChoice

Tokens = Float[Array, "b _ _"]


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "query key"]:
    """The row of the bias table that each pair of positions reads (T5's bidirectional buckets).

    Half of the buckets serve keys after the query, half the others. In each half, the first half holds one distance
    a bucket, the rest grow logarithmically up to `max_distance`; everything farther shares the last.

    Args:
        length: number of tokens of queries and of keys.
        num_buckets: rows of the table.
        max_distance: the distance in tokens at which the last bucket is reached.

    Returns:
        int32 [length, length] in 0..num_buckets-1, computed by numpy: it is a constant of the program.
    """
    half = num_buckets // 2
    exact = half // 2
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    # float32 as in the published code: distances such as 16, 32 and 64 lie exactly on the border of two buckets.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    growth = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return ((relative > 0) * half + np.where(distance < exact, distance, far)).astype(np.int32)


class _Embedding(nnx.Module):
    """A table of rows. embedding: [rows, features]."""

    def __init__(self, rows: int, features: int, *, std: float, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.embedding = nnx.Param(_normal(rngs, (rows, features), std, param_dtype))

    def __call__(self, index: Int[Array, "*n"] | Int[np.ndarray, "*n"]) -> Float[Array, "*n d"]:
        return self.embedding[...][index].astype(jnp.float32)


class _Attention(nnx.Module):
    def __init__(self, config: Umt5Config, *, rngs: nnx.Rngs, **options: object):
        head_dim = config.dim_attn // config.num_heads
        # T5's initialisation puts the missing 1/sqrt(head_dim) into q.
        self.q = _linear(config.dim, config.dim_attn, std=(config.dim * head_dim) ** -0.5, rngs=rngs, **options)
        self.k = _linear(config.dim, config.dim_attn, std=config.dim**-0.5, rngs=rngs, **options)
        self.v = _linear(config.dim, config.dim_attn, std=config.dim**-0.5, rngs=rngs, **options)
        self.o = _linear(config.dim_attn, config.dim, std=config.dim_attn**-0.5, rngs=rngs, **options)
        self.num_heads = config.num_heads

    def __call__(self, x: Tokens, bias: Float[Array, "query key h"], mask: Int[Array, "b l"]) -> Tokens:
        rows = self.q.prepare(x)
        q, k, v = (project(rows).reshape(*x.shape[:2], self.num_heads, -1) for project in (self.q, self.k, self.v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits + bias.transpose(2, 0, 1)[None]
        logits = jnp.where(mask[:, None, None, :] == 0, jnp.finfo(jnp.float32).min, logits)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
        return self.o(y.reshape(*x.shape[:2], -1))


class _FeedForward(nnx.Module):
    """Gated: fc2(fc1(x) * gelu(gate(x))), gelu in its tanh form."""

    def __init__(self, config: Umt5Config, *, rngs: nnx.Rngs, **options: object):
        self.gate = _linear(config.dim, config.dim_ffn, std=config.dim**-0.5, rngs=rngs, **options)
        self.fc1 = _linear(config.dim, config.dim_ffn, std=config.dim**-0.5, rngs=rngs, **options)
        self.fc2 = _linear(config.dim_ffn, config.dim, std=config.dim_ffn**-0.5, rngs=rngs, **options)

    def __call__(self, x: Tokens) -> Tokens:
        x = self.fc1.prepare(x)
        return self.fc2(self.fc1(x) * self.gate.gelu(x))


class _Block(nnx.Module):
    def __init__(self, config: Umt5Config, *, rngs: nnx.Rngs, **options: Any):
        param_dtype = options["param_dtype"]
        self.norm1 = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.attn = _Attention(config, rngs=rngs, **options)
        self.norm2 = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.ffn = _FeedForward(config, rngs=rngs, **options)
        std = (2 * config.num_buckets * config.num_heads) ** -0.5
        self.pos_embedding = _Embedding(
            config.num_buckets, config.num_heads, std=std, rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x: Tokens, buckets: Int[np.ndarray, "l l"], mask: Int[Array, "b l"]) -> Tokens:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), mask).astype(jnp.float32)
        return x + self.ffn(self.norm2(x)).astype(jnp.float32)


class Umt5Encoder(nnx.Module):
    """UMT5 encoder.

    Parameters: token_embedding, blocks (every leaf with a leading layer axis), norm.

    Args:
        config: sizes.
        rngs: where new parameters come from (T5's initialisation).
        dtype: dtype of the matmuls.
        param_dtype: dtype of new parameters.
        quantization: what the blocks' matrices are stored as; such a model is to be filled from a checkpoint.
        ops: who computes 8-bit matmuls. Attention, which has biases, is always plain.
    """

    def __init__(
        self,
        config: Umt5Config,
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
        self.token_embedding = _Embedding(config.vocab_size, config.dim, std=1.0, rngs=rngs, param_dtype=param_dtype)
        self.blocks = stacked(lambda rngs: _Block(config, rngs=rngs, **options), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.config = config

    def __call__(self, ids: Int[Array, "b l"], mask: Int[Array, "b l"]) -> Tokens:
        """Encodes prompts.

        Args:
            ids: token ids, padded to a common length.
            mask: 1 for tokens, 0 for padding. Padding is neither attended nor returned.

        Returns:
            float32 [B, L, D] features, zero where the mask is.
        """
        buckets = relative_position_buckets(ids.shape[1], self.config.num_buckets, self.config.max_distance)
        x = scan_blocks(self.blocks, self.token_embedding(ids), lambda block, x: block(x, buckets, mask))
        return jnp.where(mask[..., None] == 0, 0.0, self.norm(x))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> Array:
    return (std * jax.random.normal(rngs.params(), shape)).astype(dtype)


def _linear(in_features: int, out_features: int, *, std: float, rngs: nnx.Rngs, **options: Any) -> Any:
    made = linear(in_features, out_features, rngs=rngs, use_bias=False, **options)
    if isinstance(made, Linear):
        made.kernel[...] = _normal(rngs, (in_features, out_features), std, options["param_dtype"])
    return made
