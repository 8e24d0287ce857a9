"""Attention to rows that lie in a larger array, such as one layer's in the cache of all layers, without a copy of them.

Rows are read a part at a time, from where they lie, while a running maximum and sum keep the softmax exact (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018). Neither all rows nor all scores ever exist at one time,
so the memory does not depend on how many rows there are; and rows that do not count yet cost no time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from x2v_jax.ops.attention.api import Implementation, attention, attention_cudnn, takes_cudnn
from x2v_jax.ops.attention.choose_hopper import hopper_config, on_hopper
from x2v_jax.ops.attention.hopper import attention_hopper_groups, takes_groups
from x2v_jax.ops.attention.hopper_config import HopperConfig, Precision

# Fewer bytes of keys and values than this are read as a whole: one product is faster than several, and gradients pass.
_FEW_BYTES = 16 << 20
# What cuDNN is given at one time. It wants whole rows, so heads are taken in groups.
_CUDNN_BYTES = 100 << 20
# Scores that exist at one time (float32), and over how many rows. 32 MiB stay in the second-level cache of a GPU; with
# more rows a part, and fewer queries beside them, products on CPU take twice as long.
_SCORES = 1 << 23
_ROWS = 512


@runtime_checkable
class ReadRows(Protocol):
    """Keys and values of some rows and heads, in the type to compute in; where they start may be traced."""

    def __call__(
        self, source: PyTree[Array | int], first_row: Array | int, rows: int, first_head: Array | int, heads: int
    ) -> tuple[Float[Array, "b r g d"], Float[Array, "b r g d"]]: ...


class RowsInPlace(NamedTuple):
    """Where rows lie in an array of groups of rows: those of batch item b are the group first_group + b."""

    k: Float[Array, "g r h d"]
    v: Float[Array, "g r h d"]
    first_group: Array


InPlace = Callable[[PyTree[Array | int]], RowsInPlace | None]


def attention_in_parts(
    q: Float[Array, "b lq h d"],
    source: PyTree[Array | int],
    read: ReadRows,
    *,
    rows: int,
    length: Int[Array, ""],
    scale: float | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "full",
    in_place: InPlace = lambda source: None,
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v over the first `length` of `rows` rows that `read` takes from `source`.

    Args:
        source: a tree of arrays that holds the rows; nothing of its size is made of it.
        read: how a part of the rows is got out of `source`. The same rows come out the same, whatever part is asked.
        length: how many of the first rows count, at least 1; may be traced. The rows behind it must be finite.
        scale: 1 / sqrt(d) if None.
        implementation: see `attention`. "cudnn" copies the rows of a few heads at a time, "reference" a few rows,
            "hopper" none.
        precision: see `attention`. In 8 bits all rows are read at once: their scales are of all that count.
        in_place: the same rows where they lie in `source`; None where they are kept in another form. The Hopper kernel
            reads them there.

    A gradient reads all rows at once: it needs their size anyway, to be kept in.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    fixed: dict[str, Any] = {"read": read, "rows": rows, "scale": factor}

    def whole(q: Array, source: PyTree[Array | int], length: ArrayLike) -> Array:
        k, v = read(source, 0, rows, 0, q.shape[2])
        length = jnp.asarray(length)  # a gradient gives a length that is known as NumPy's
        return attention(
            q, k, v, scale=factor, key_length=length, implementation=implementation, precision=precision
        )  # fmt: skip

    if precision != "full" or _row_bytes(q) * rows <= _FEW_BYTES:
        return whole(q, source, length)

    @jax.custom_vjp
    def in_parts(q: Array, source: PyTree[Array | int], length: Array) -> Array:
        cudnn, reference = (functools.partial(f, **fixed) for f in (_by_heads, _by_rows))
        if implementation == "cudnn":
            return cudnn(q, source, length)
        fastest = None
        if implementation in ("auto", "hopper"):
            config = _config(q, in_place(source), implementation)
            if config is not None:
                fastest = functools.partial(_in_place, in_place=in_place, scale=factor, config=config)
            elif takes_cudnn(q):
                fastest = cudnn
        if fastest is None:
            return reference(q, source, length)
        return jax.lax.platform_dependent(q, source, length, cuda=fastest, default=reference)

    in_parts.defvjp(functools.partial(jax.vjp, whole), lambda pullback, gradient: pullback(gradient))
    return in_parts(q, source, length)


def _config(q: Array, rows: RowsInPlace | None, implementation: Implementation) -> HopperConfig | None:
    """Of the Hopper kernel, where it can read the rows from where they lie."""
    if rows is None or not takes_groups(q, rows.k) or not (implementation == "hopper" or on_hopper()):
        return None
    return hopper_config("full", q.shape[1], rows.k.shape[1])


def _in_place(
    q: Array, source: PyTree[Array | int], length: Array, *, in_place: InPlace, scale: float, config: HopperConfig
) -> Array:
    rows = in_place(source)
    assert rows is not None  # or no kernel would have been chosen
    k, v, first_group = rows
    return attention_hopper_groups(
        q, k, v, first_group=first_group, key_length=length, scale=scale, config=config
    )  # fmt: skip


def _row_bytes(q: Array) -> int:
    b, _, h, d = q.shape
    return 2 * b * h * d * q.dtype.itemsize


def _by_heads(
    q: Array, source: PyTree[Array | int], length: Array, *, read: ReadRows, rows: int, scale: float
) -> Array:
    """Heads in groups: every group is complete, so nothing has to be put together, at the full speed of cuDNN."""
    b, lq, h, d = q.shape
    most = max(1, _CUDNN_BYTES * h // (_row_bytes(q) * rows))
    group = next(g for g in range(min(most, h), 0, -1) if h % g == 0)

    def attend(first: Array) -> Array:
        k, v = read(source, 0, rows, first, group)
        heads = jax.lax.dynamic_slice_in_dim(q, first, group, axis=2)
        return attention_cudnn(heads, k, v, scale=scale, key_length=length)

    out = jax.lax.map(attend, jnp.arange(0, h, group))
    return jnp.moveaxis(out, 0, 2).reshape(b, lq, h, d)


def _by_rows(q: Array, source: PyTree[Array | int], length: Array, *, read: ReadRows, rows: int, scale: float) -> Array:
    """Rows in parts, for queries in tiles. Heads lead, as products on every platform want it."""
    b, lq, h, d = q.shape
    part = min(_ROWS, rows)
    tiles = math.ceil(lq / max(1, _SCORES // (b * h * part)))
    # Multiples of 8: matrix units take no other sizes without padding.
    tile = lq if tiles == 1 else math.ceil(lq / tiles / 8) * 8
    tiles = math.ceil(lq / tile)
    padded = jnp.pad(q, ((0, 0), (0, tiles * tile - lq), (0, 0), (0, 0)))
    split = padded.reshape(b, tiles, tile, h, d).transpose(1, 0, 3, 2, 4)

    def attend(q: Array) -> Array:
        def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = carry
            # The last part starts early where parts do not divide the rows, and leaves out what was seen already.
            start = jnp.minimum(i * part, rows - part)
            k, v = (x.swapaxes(1, 2) for x in read(source, start, part, 0, h))
            scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
            place = start + jnp.arange(part)
            scores = jnp.where((place >= i * part) & (place < length), scores, -jnp.inf)
            # Finite from the first part on: at least one row counts there.
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, decay = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            more = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return out * decay + more, new_top, total * decay + weights.sum(-1, keepdims=True)

        column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        parts = (length + part - 1) // part
        out, _, total = jax.lax.fori_loop(0, parts, add, (jnp.zeros(q.shape, jnp.float32), column - jnp.inf, column))
        return (out / total).astype(q.dtype)

    out = attend(split[0])[None] if tiles == 1 else jax.lax.map(attend, split)
    return out.transpose(1, 0, 3, 2, 4).reshape(b, tiles * tile, h, d)[:, :lq]
