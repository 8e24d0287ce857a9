"""The transformer block of `wan.py` and what it is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.models.config import WanConfig
from x2v_jax.models.layers import LayerNorm, Linear, RMSNorm, named_output, normalize
from x2v_jax.models.rope import RopeTables, apply_rope
from x2v_jax.ops.attention import Span, attention, attention_by_spans

Tokens = Float[Array, "b _ _"]


class KeyValueCache(Protocol):
    """Keys and values of earlier frames in every layer; a tree of arrays. `layer` and `start_frame` may be traced."""

    def write(self, layer: Any, keys: Array, values: Array, start_frame: Any) -> Self:
        """Stores keys and values [B, L, H, D] of the whole frames from `start_frame` on. Keys are already turned."""
        ...

    def attend(self, layer: Any, q: Array, end_frame: Any) -> Array:
        """Attention of queries [B, L, H, D] that end before `end_frame` to the rows that a layer has by then."""
        ...


class CrossKeys(NamedTuple):
    """Keys and values of the text and, image-to-video, of the image: [B, N, H, D], or [layers, B, N, H, D]."""

    k: Array
    v: Array
    k_img: Array | None = None
    v_img: Array | None = None


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, sizes: tuple[int, int, int], activation: Any, *, rngs: nnx.Rngs, **dtypes: Any):
        self.linear_1 = Linear(sizes[0], sizes[1], rngs=rngs, **dtypes)
        self.linear_2 = Linear(sizes[1], sizes[2], rngs=rngs, **dtypes)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class _Attention(nnx.Module):
    """Projections and query/key norms that self and cross attention share."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.q = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
        self.k = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
        self.v = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
        self.o = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
        self.norm_q = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])
        self.norm_k = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])
        self.num_heads = config.num_heads
        self.dtype = dtypes["dtype"]

    def heads(self, x: Tokens) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1).astype(self.dtype)

    def project_out(self, y: Array) -> Tokens:
        return self.o(y.reshape(*y.shape[:2], -1))


class SelfAttention(_Attention):
    def __call__(self, x: Tokens, rope: RopeTables, spans: Sequence[Span] | None = None) -> Tokens:
        q, k, v = self.queries_keys_values(x, rope)
        return self.project_out(
            named_output(attention(q, k, v) if spans is None else attention_by_spans(q, k, v, spans))
        )

    def with_cache(
        self, x: Tokens, rope: RopeTables, cache: Any, layer: Array, start_frame: Array, end_frame: Array
    ) -> tuple[Tokens, Any]:
        q, k, v = self.queries_keys_values(x, rope)
        cache = cache.write(layer, k, v, start_frame)
        return self.project_out(cache.attend(layer, q, end_frame)), cache

    def after(self, x: Tokens, rope: RopeTables, keys: Array, values: Array, start_row: Array) -> Tokens:
        """Attention to the first `start_row` rows of constant keys and values [B, T, H, D], and to itself."""
        q, k, v = self.queries_keys_values(x, rope)
        keys, values = (
            jax.lax.dynamic_update_slice(jax.lax.stop_gradient(old).astype(new.dtype), new, (0, start_row, 0, 0))
            for old, new in ((keys, k), (values, v))
        )
        return self.project_out(named_output(attention(q, keys, values, key_length=start_row + x.shape[1])))

    def queries_keys_values(self, x: Tokens, rope: RopeTables) -> tuple[Array, Array, Array]:
        q = apply_rope(self.norm_q(self.q(x)).reshape(*x.shape[:2], self.num_heads, -1), rope)
        k = apply_rope(self.norm_k(self.k(x)).reshape(*x.shape[:2], self.num_heads, -1), rope)
        return q.astype(self.dtype), k.astype(self.dtype), self.heads(self.v(x))


class CrossAttention(_Attention):
    """Attention to the text, and for image-to-video to the image with keys and values of its own; the two are summed.

    The padding of the text is attended too: the published models were trained without a mask.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        super().__init__(config, rngs=rngs, **dtypes)
        if config.model_type == "i2v":
            self.k_img = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
            self.v_img = Linear(config.dim, config.dim, rngs=rngs, **dtypes)
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps, param_dtype=dtypes["param_dtype"])

    def keys(self, text: Tokens, image: Tokens | None) -> CrossKeys:
        k, v = self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))
        if image is None:
            return CrossKeys(k, v)
        return CrossKeys(k, v, self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image)))

    def __call__(self, x: Tokens, keys: CrossKeys) -> Tokens:
        q = self.heads(self.norm_q(self.q(x)))
        y = attention(q, keys.k, keys.v)
        if keys.k_img is not None and keys.v_img is not None:
            y = y + attention(q, keys.k_img, keys.v_img)
        return self.project_out(named_output(y))


class Block(nnx.Module):
    """Self attention, cross attention and feed-forward, the first and last modulated by the timestep.

    time: [B, 6, D], or [B, F, 6, D] where every frame has its own timestep.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        param_dtype = dtypes["param_dtype"]
        self.modulation = nnx.Param(modulation_init(rngs, 6, config.dim, param_dtype))
        self.self_attn = SelfAttention(config, rngs=rngs, **dtypes)
        self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.cross_attn = CrossAttention(config, rngs=rngs, **dtypes)
        self.ffn = Mlp((config.dim, config.ffn_dim, config.dim), jax.nn.gelu, rngs=rngs, **dtypes)
        self.eps = config.eps

    def __call__(
        self,
        x: Tokens,
        time: Float[Array, "b *f 6 _"],
        text: Tokens,
        image: Tokens | None,
        rope: RopeTables,
        spans: Sequence[Span] | None = None,
    ) -> Tokens:
        parts = modulation_parts(self.modulation, time, x.shape[1])
        y = self.self_attn(self._before_attention(x, parts), rope, spans)
        return self._after_attention(x, y, parts, self.cross_attn.keys(text, image))

    def with_cache(
        self,
        x: Tokens,
        time: Float[Array, "b *f 6 _"],
        keys: CrossKeys,
        rope: RopeTables,
        cache: Any,
        layer: Array,
        start_frame: Array,
        end_frame: Array,
    ) -> tuple[Tokens, Any]:
        parts = modulation_parts(self.modulation, time, x.shape[1])
        y = self._before_attention(x, parts)
        y, cache = self.self_attn.with_cache(y, rope, cache, layer, start_frame, end_frame)
        return self._after_attention(x, y, parts, keys), cache

    def after(
        self,
        x: Tokens,
        time: Float[Array, "b *f 6 _"],
        cross: CrossKeys,
        rope: RopeTables,
        keys: Array,
        values: Array,
        start_row: Array,
    ) -> Tokens:
        parts = modulation_parts(self.modulation, time, x.shape[1])
        y = self.self_attn.after(self._before_attention(x, parts), rope, keys, values, start_row)
        return self._after_attention(x, y, parts, cross)

    def _before_attention(self, x: Tokens, parts: Sequence[Array]) -> Tokens:
        shift, scale, *_ = parts
        return normalize(x, self.eps) * (1 + scale) + shift

    def _after_attention(self, x: Tokens, y: Tokens, parts: Sequence[Array], keys: CrossKeys) -> Tokens:
        _, _, gate_1, shift_2, scale_2, gate_2 = parts
        x = x + y.astype(jnp.float32) * gate_1
        x = x + self.cross_attn(self.norm3(x), keys).astype(jnp.float32)
        y = self.ffn(normalize(x, self.eps) * (1 + scale_2) + shift_2)
        return x + y.astype(jnp.float32) * gate_2


def modulation_parts(modulation: nnx.Param, time: Array, tokens: int) -> list[Array]:
    """The parts of modulation + time, each [B, 1, D], or [B, L, D] where time [B, F, parts, D] differs by frame."""
    parts = modulation[...].astype(jnp.float32) + time.astype(jnp.float32)
    if time.ndim == 3:
        return jnp.split(parts, parts.shape[1], axis=1)
    return [jnp.repeat(part, tokens // time.shape[1], axis=1) for part in jnp.moveaxis(parts, 2, 0)]


def modulation_init(rngs: nnx.Rngs, parts: int, dim: int, param_dtype: DTypeLike) -> Array:
    return jax.random.normal(rngs.params(), (parts, dim), param_dtype) / dim**0.5
