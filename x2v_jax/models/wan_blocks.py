"""The transformer block of `wan.py` and what it is made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import broadcast_to_rank
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from x2v_jax.models.activation_stats import observe
from x2v_jax.models.config import WanConfig
from x2v_jax.models.layers import LayerNorm, RMSNorm, linear, named_output
from x2v_jax.models.rope import RopeTables
from x2v_jax.ops.attention import Span, attention, attention_by_spans, query_dtype
from x2v_jax.ops.choice import OpChoice
from x2v_jax.ops.fused_norms import rmsnorm_rope
from x2v_jax.ops.linear_8bit import QuantizedRows

Tokens = Float[Array, "b _ _"]
# What linear layers read: `Linear.prepare` or `Linear.modulate` gives it.
Prepared = Tokens | QuantizedRows


@runtime_checkable
class KeyValueCache(Protocol):
    """Keys and values of earlier frames in every layer; a tree of arrays. `layer` and `start_frame` may be traced."""

    def write(self, layer: object, keys: Array, values: Array, start_frame: object) -> Self:
        """Stores keys and values [B, L, H, D] of the whole frames from `start_frame` on. Keys are already turned."""
        ...

    def attend(self, layer: object, q: Array, end_frame: object, *, implementation: object, precision: object) -> Array:
        """Attention of queries [B, L, H, D] that end before `end_frame` to the rows that a layer has by then.

        implementation, precision: as of `ops.attention.attention`.
        """
        ...


class CrossKeys(NamedTuple):
    """Keys and values of the text and, image-to-video, of the image: [B, N, H, D], or [layers, B, N, H, D]."""

    k: Array
    v: Array
    k_img: Array | None = None
    v_img: Array | None = None


class Mlp(nnx.Module):
    """Two linear layers with an activation between them. smoothed: see `Block`."""

    def __init__(
        self, sizes: tuple[int, int, int], activation: Any, *, rngs: nnx.Rngs, smoothed: bool = False, **options: Any
    ):
        self.smooth = _smooth(sizes[0]) if smoothed else None
        self.linear_1 = linear(sizes[0], sizes[1], rngs=rngs, **options)
        self.linear_2 = linear(sizes[1], sizes[2], rngs=rngs, **options)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class _Attention(nnx.Module):
    """Projections and query/key norms that self and cross attention share. Results are those before `o`."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, ops: OpChoice, **options: Any):
        self.q = linear(config.dim, config.dim, rngs=rngs, ops=ops, **options)
        self.k = linear(config.dim, config.dim, rngs=rngs, ops=ops, **options)
        self.v = linear(config.dim, config.dim, rngs=rngs, ops=ops, **options)
        self.o = linear(config.dim, config.dim, rngs=rngs, ops=ops, **options)
        self.norm_q = RMSNorm(config.dim, eps=config.eps, param_dtype=options["param_dtype"])
        self.norm_k = RMSNorm(config.dim, eps=config.eps, param_dtype=options["param_dtype"])
        self.num_heads = config.num_heads
        self.dtype = options["dtype"]
        self.ops = ops

    def heads(self, x: Tokens) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1).astype(self.dtype)

    @property
    def attention_options(self) -> dict[str, Any]:
        return {"implementation": self.ops.attention, "precision": self.ops.attention_precision}


class SelfAttention(_Attention):
    """smoothed: see `Block`."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, smoothed: bool, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        self.smooth = _smooth(config.dim) if smoothed else None

    def __call__(self, x: Prepared, rope: RopeTables, spans: Sequence[Span] | None = None) -> Tokens:
        q, k, v = self.queries_keys_values(x, rope, in_8_bits=spans is None)
        y = (
            attention(q, k, v, **self.attention_options)
            if spans is None
            else attention_by_spans(q, k, v, spans, **self.attention_options)
        )
        return _without_heads(named_output(y))

    def with_cache(
        self, x: Prepared, rope: RopeTables, cache: Any, layer: Array, start_frame: Array, end_frame: Array
    ) -> tuple[Tokens, Any]:
        q, k, v = self.queries_keys_values(x, rope)
        cache = cache.write(layer, k, v, start_frame)
        return _without_heads(cache.attend(layer, q, end_frame, **self.attention_options)), cache

    def after(self, x: Prepared, rope: RopeTables, keys: Array, values: Array, start_row: Array) -> Tokens:
        """Attention to the first `start_row` rows of constant keys and values [B, T, H, D], and to itself."""
        q, k, v = self.queries_keys_values(x, rope)
        keys, values = (
            jax.lax.dynamic_update_slice(jax.lax.stop_gradient(old).astype(new.dtype), new, (0, start_row, 0, 0))
            for old, new in ((keys, k), (values, v))
        )
        y = attention(q, keys, values, key_length=start_row + q.shape[1], **self.attention_options)
        return _without_heads(named_output(y))

    def queries_keys_values(
        self, x: Prepared, rope: RopeTables, *, in_8_bits: bool = False
    ) -> tuple[Any, Array, Array]:
        """in_8_bits: queries come rounded, for an attention in 8 bits. Keys cannot: their mean has to be known."""
        precision = self.ops.attention_precision
        of_queries = query_dtype(precision) if in_8_bits and precision != "full" else self.dtype
        q, k = (
            rmsnorm_rope(y, norm.scale[...], norm.eps, rope, dtype=dtype, implementation=self.ops.linear)
            for y, norm, dtype in ((self.q(x), self.norm_q, of_queries), (self.k(x), self.norm_k, self.dtype))
        )
        return q, k, self.heads(self.v(x))


class CrossAttention(_Attention):
    """Attention to the text, and for image-to-video to the image with keys and values of its own; the two are summed.

    The padding of the text is attended too: the published models were trained without a mask.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(config, rngs=rngs, **options)
        if config.model_type == "i2v":
            self.k_img = linear(config.dim, config.dim, rngs=rngs, **options)
            self.v_img = linear(config.dim, config.dim, rngs=rngs, **options)
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps, param_dtype=options["param_dtype"])

    def keys(self, text: Tokens, image: Tokens | None) -> CrossKeys:
        own = self.k.prepare(text)
        k, v = self.heads(self.norm_k(self.k(own))), self.heads(self.v(own))
        if image is None:
            return CrossKeys(k, v)
        own = self.k_img.prepare(image)
        return CrossKeys(k, v, self.heads(self.norm_k_img(self.k_img(own))), self.heads(self.v_img(own)))

    def __call__(self, x: Prepared, keys: CrossKeys) -> Prepared:
        q = self.heads(self.norm_q(self.q(x)))
        y, of_image = _without_heads(attention(q, keys.k, keys.v, **self.attention_options)), None
        if keys.k_img is not None and keys.v_img is not None:
            of_image = _without_heads(attention(q, keys.k_img, keys.v_img, **self.attention_options))
        return jax.tree.map(named_output, self.o.prepare(y, of_image))


class Block(nnx.Module):
    """Self attention, cross attention and feed-forward, the first and last modulated by the timestep.

    time: [B, 6, D], or [B, F, 6, D] where every frame has its own timestep.

    smoothed: the columns of q, k, v and of the first matrix of the feed-forward were multiplied by factors before they
    were brought to 8 bits, and their inputs are divided by the same. The parameters `smooth` [D] hold 1 / factor. The
    norms before these matrices have no weights that could take it, so the modulation does: a few vectors change, no
    tokens. What other matrices have of the kind is in the weights before them; see `checkpoint.smoothing`.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, smoothed: bool = False, **options: Any):
        param_dtype = options["param_dtype"]
        self.modulation = nnx.Param(modulation_init(rngs, 6, config.dim, param_dtype))
        self.self_attn = SelfAttention(config, rngs=rngs, smoothed=smoothed, **options)
        self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.cross_attn = CrossAttention(config, rngs=rngs, **options)
        sizes = (config.dim, config.ffn_dim, config.dim)
        self.ffn = Mlp(sizes, jax.nn.gelu, rngs=rngs, smoothed=smoothed, **options)
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
        parts = self._modulation(time, x.shape[1])
        y = self.self_attn(self._before_attention(x, parts), rope, spans)
        return self._after_attention(x, y, parts, self.cross_attn.keys(text, image))

    def with_cache(
        self,
        x: Tokens,
        time: Float[Array, "b *f 6 _"],
        keys: CrossKeys,
        rope: RopeTables,
        cache: object,
        layer: Array,
        start_frame: Array,
        end_frame: Array,
    ) -> tuple[Tokens, Any]:
        parts = self._modulation(time, x.shape[1])
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
        parts = self._modulation(time, x.shape[1])
        y = self.self_attn.after(self._before_attention(x, parts), rope, keys, values, start_row)
        return self._after_attention(x, y, parts, cross)

    def _modulation(self, time: Array, tokens: int) -> list[Array]:
        smooth = self.self_attn.smooth, self.ffn.smooth
        if smooth[0] is None or smooth[1] is None:
            return modulation_parts(self.modulation, time, tokens)
        return modulation_parts(self.modulation, time, tokens, (smooth[0][...], smooth[1][...]))

    def _before_attention(self, x: Tokens, parts: Sequence[Array]) -> Prepared:
        shift, scale, *_ = parts
        return observe("self_attn.q", self.self_attn.q.modulate(x, shift, scale, self.eps))

    def _after_attention(self, x: Tokens, y: Tokens, parts: Sequence[Array], keys: CrossKeys) -> Tokens:
        """y: what self attention gives, before its last projection."""
        _, _, gate_1, shift_2, scale_2, gate_2 = parts
        x = self.self_attn.o.add_to(x, observe("self_attn.o", y), gate_1)
        given = observe("cross_attn.q", self.cross_attn.q.normalize(x, self.norm3))
        x = self.cross_attn.o.add_to(x, observe("cross_attn.o", self.cross_attn(given, keys)))
        given = observe("ffn.linear_1", self.ffn.linear_1.modulate(x, shift_2, scale_2, self.eps))
        return self.ffn.linear_2.add_to(x, self.ffn.linear_1.gelu(given), gate_2)


def _without_heads(y: Array) -> Tokens:
    return y.reshape(*y.shape[:2], -1)


def _smooth(dim: int) -> nnx.Param:
    return nnx.Param(jnp.ones((dim,), jnp.float32))


def modulation_parts(
    modulation: nnx.Param, time: Array, tokens: int, smooth: tuple[Array, Array] | None = None
) -> list[Array]:
    """The parts of modulation + time, each [B, 1, D], or [B, L, D] where time [B, F, parts, D] differs by frame.

    Args:
        smooth: of a block's six parts (shift, scale, gate, twice), what the two modulated inputs [D] are multiplied by.
    """
    parts = broadcast_to_rank(modulation[...].astype(jnp.float32), time.ndim) + time.astype(jnp.float32)
    if smooth is not None:
        # y (1 + scale) + shift, times f, is y (1 + scale') + shift' with these:
        one, (first, second) = jnp.ones_like(smooth[0]), smooth
        parts = parts * broadcast_to_rank(jnp.stack([first, first, one, second, second, one]), parts.ndim)
        parts = parts.at[..., 1, :].add(first - 1).at[..., 4, :].add(second - 1)
    if time.ndim == 3:
        return jnp.split(parts, parts.shape[1], axis=1)
    return [jnp.repeat(part, tokens // time.shape[1], axis=1) for part in jnp.moveaxis(parts, 2, 0)]


def modulation_init(rngs: nnx.Rngs, parts: int, dim: int, param_dtype: DTypeLike) -> Array:
    return jax.random.normal(rngs.params(), (parts, dim), param_dtype) / dim**0.5
