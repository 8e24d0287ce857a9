"""Attention under a block mask without a mask: each span of queries attends, densely, to its own keys.

Block-causal masks with a window and a sink have this form. Nothing of size queries x keys is stored, keys that are
masked cost nothing, and every part can be taken by the kernels that know no masks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from x2v_jax.ops.attention.api import Implementation, attention


class Span(NamedTuple):
    """Queries [start, stop) attend to the keys [0, sink) and [first_key, stop_key). sink <= first_key."""

    start: int
    stop: int
    first_key: int
    stop_key: int
    sink: int = 0


def attention_by_spans(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v, each span of queries over its own keys. The spans cover all queries in order.

    One attention a span is compiled: meant for the tens of blocks of a training clip, not for thousands.
    """
    _check(spans, q.shape[1], k.shape[1])
    outputs = []
    for span in spans:
        keys, values = (_rows(x, span) for x in (k, v))
        outputs.append(
            attention(q[:, span.start : span.stop], keys, values, scale=scale, implementation=implementation)
        )
    return jnp.concatenate(outputs, axis=1)


def _rows(x: Array, span: Span) -> Array:
    recent = x[:, span.first_key : span.stop_key]
    return recent if not span.sink else jnp.concatenate([x[:, : span.sink], recent], axis=1)


def _check(spans: Sequence[Span], queries: int, keys: int) -> None:
    position = 0
    for span in spans:
        if span.start != position or span.stop <= span.start:
            raise ValueError(f"{span} does not go on at query {position}")
        if not 0 <= span.sink <= span.first_key < span.stop_key <= keys:
            raise ValueError(f"{span} asks for keys that are not within {keys}, or for some of them twice")
        position = span.stop
    if position != queries:
        raise ValueError(f"the spans end at query {position} of {queries}")
