"""Attention under a block mask without a mask: each span of queries attends, densely, to its own keys.

Block-causal masks with a window and a sink have this form. Nothing of size queries x keys is stored, and keys that are
masked cost nothing. The Hopper kernel takes a whole clip at once, from a table; every other implementation gets the
spans one by one, and need not know of masks.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from x2v_jax.ops.attention.api import Implementation, attention
from x2v_jax.ops.attention.choose_hopper import hopper_config
from x2v_jax.ops.attention.hopper import attention_hopper_spans, takes_hopper
from x2v_jax.ops.attention.hopper_config import Precision
from x2v_jax.ops.attention.reference import with_gradient_of
from x2v_jax.ops.attention.simulated import attention_simulated
from x2v_jax.ops.attention.tiles import Span, check_spans


def attention_by_spans(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    spans: Sequence[Span],
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "full",
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v, each span of queries over its own keys. The spans cover all queries in order.

    implementation, precision: as of `attention`. "auto" in full precision takes spans one by one, which for training
    has the faster backward pass. One attention a span is compiled then: meant for the tens of blocks of a clip, not for
    thousands.
    """
    check_spans(spans, q.shape[1], k.shape[1])
    one_by_one = functools.partial(_one_by_one, spans=spans, scale=scale)
    if precision == "full" and (implementation != "hopper" or not takes_hopper(q, k, v)):
        return one_by_one(q, k, v, implementation=implementation)
    if implementation == "cudnn":
        return one_by_one(q, k, v, implementation=implementation, precision=precision)  # which says why not

    fixed: dict[str, Any] = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "precision": precision}
    exact = with_gradient_of(lambda q, k, v, _: one_by_one(q, k, v), _reference(spans, one_by_one, fixed))
    if implementation == "reference" or not takes_hopper(q, k, v):
        return exact(q, k, v, None)
    config = hopper_config(precision, q.shape[1], k.shape[1])
    if config is None:
        return one_by_one(q, k, v)
    kernel = functools.partial(attention_hopper_spans, spans=spans, config=config, **fixed)
    by_kernel = with_gradient_of(lambda q, k, v, _: one_by_one(q, k, v), lambda q, k, v, _: kernel(q, k, v))
    return jax.lax.platform_dependent(
        q, k, v, cuda=lambda q, k, v: by_kernel(q, k, v, None), default=lambda q, k, v: exact(q, k, v, None)
    )


def _reference(spans: Sequence[Span], one_by_one: Any, fixed: dict[str, Any]) -> Any:
    if fixed["precision"] == "full":
        return lambda q, k, v, _: one_by_one(q, k, v, implementation="reference")
    # As the kernel has it: keys have their scales once, whoever attends to them.
    return lambda q, k, v, _: attention_simulated(q, k, v, spans=spans, **fixed)[0]


def _one_by_one(q: Array, k: Array, v: Array, *, spans: Sequence[Span], **arguments: Any) -> Array:
    outputs = []
    for span in spans:
        keys, values = (_rows(x, span) for x in (k, v))
        outputs.append(attention(q[:, span.start : span.stop], keys, values, **arguments))
    return jnp.concatenate(outputs, axis=1)


def _rows(x: Array, span: Span) -> Array:
    recent = x[:, span.first_key : span.stop_key]
    return recent if not span.sink else jnp.concatenate([x[:, : span.sink], recent], axis=1)
