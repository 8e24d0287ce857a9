"""What the matrices and attentions of a trained network are given while it makes videos, for errors on real numbers."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.models import layers, wan_blocks

# The matrices of a block in the order in which it calls them.
MATRICES = (
    "self q", "self k", "self v", "cross k", "cross v", "self o", "cross q", "cross o", "ffn 1", "ffn 2"
)  # fmt: skip
ATTENTIONS = ("self", "cross")


@dataclasses.dataclass
class Recording:
    """matrices: (input [B, L, in], kernel [in, out], bias [out]) by the matrix' name, of every block and step in turn.

    attentions: (q, k, v), each [B, L, H, D], likewise.
    """

    matrices: dict[str, list[tuple[np.ndarray, ...]]]
    attentions: dict[str, list[tuple[np.ndarray, ...]]]


@contextlib.contextmanager
def listening() -> Iterator[Recording]:
    """What blocks of networks that are traced and run within are given. They must compute in float32."""
    heard = Recording(collections.defaultdict(list), collections.defaultdict(list))
    block, linear, attention = wan_blocks.Block.__call__, layers.Linear.__call__, wan_blocks.attention
    # What the block that is being traced has called so far; None outside of blocks.
    calls: list[list[str] | None] = [None]

    def record(store: dict[str, list[Any]], name: str, *arrays: jax.Array) -> None:
        def keep(*values: Any) -> None:
            store[name].append(tuple(np.asarray(value, np.float32) for value in values))

        jax.debug.callback(keep, *arrays, ordered=True)

    def block_call(self: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] = []
        try:
            return block(self, *arguments, **options)
        finally:
            calls[0] = None

    def linear_call(self: Any, x: Any) -> Any:
        if calls[0] is not None:
            name = MATRICES[sum(call in MATRICES for call in calls[0])]
            calls[0].append(name)
            record(heard.matrices, name, x, self.kernel[...], self.bias[...])
        return linear(self, x)

    def attention_call(q: Any, k: Any, v: Any, **options: Any) -> Any:
        if calls[0] is not None:
            name = ATTENTIONS[sum(call in ATTENTIONS for call in calls[0])]
            calls[0].append(name)
            record(heard.attentions, name, q, k, v)
        return attention(q, k, v, **options)

    with (
        mock.patch.object(wan_blocks.Block, "__call__", block_call),
        mock.patch.object(layers.Linear, "__call__", linear_call),
        mock.patch.object(wan_blocks, "attention", attention_call),
    ):
        yield heard
        jax.effects_barrier()


def record_sampling(checkpoint: Any, prompts: Sequence[str], seed: int = 0) -> Recording:
    """A step-distilled text-to-video checkpoint's numbers while it samples the prompts, together, in float32."""
    from benchmarks.tiny_world.sampling import ShapesModel, make_sampler
    from train.data.sources import Conditions
    from x2v_jax.request import Request
    from x2v_jax.request.resolve import WholePlan, resolve

    model = ShapesModel(checkpoint, "float32", ("transformer", "text_encoder"))
    request = resolve(Request(prompt="-", seed=seed), checkpoint)
    assert isinstance(request.plan, WholePlan)
    texts = model.encode_text([*prompts, request.negative_prompt])
    keys = jax.vmap(jax.random.key)(jnp.arange(seed, seed + len(prompts), dtype=jnp.uint32))
    with listening() as heard:
        sample = jax.jit(make_sampler(model.graph("transformer"), request, request.plan))
        jax.block_until_ready(sample(model.params("transformer"), keys, Conditions(texts[:-1]), texts[-1]))
    return heard
