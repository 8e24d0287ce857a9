"""Blocks whose weights lie in the host's memory: each is brought to the device while the one before it is at work.

Two blocks' weights are then all that the device holds of a network, whatever its depth. On GPUs XLA makes an
asynchronous copy of what is fetched here and runs it beside the block (in the compiled program a `dynamic-slice-start`
before the block's first product and its `-done` after the last).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def with_blocks_on_host(model: Any) -> Any:
    """The network, knowing that the weights of its `blocks` will lie in the host's memory."""
    model.blocks.weights_on_host = True
    return model


def lie_on_host(blocks: object) -> bool:
    """Whether stacked blocks have their weights in the host's memory."""
    # Said, not seen: while a program is compiled ahead, there are shapes for arguments, and no memory that they lie in.
    return getattr(blocks, "weights_on_host", False)


def one_block(params: PyTree[Array], i: Array | int) -> PyTree[Array]:
    """The weights of block i, on the device: with what is in the host's memory nothing can be computed.

    Args:
        params: a tree with a leading layer axis.
        i: may be traced.
    """

    def one(leaf: Array) -> Array:
        return jax.device_put(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), jax.memory.Space.Device)

    return jax.tree.map(one, params)


def scan_from_host(
    step: Callable[[PyTree[Array], tuple[PyTree[Array], PyTree[Array]]], PyTree[Array]],
    x: PyTree[Array],
    params: PyTree[Array],
    inputs: PyTree[Array],
) -> PyTree[Array]:
    """x -> step(x, (one block's weights, its inputs)) over all blocks in order.

    Args:
        params, inputs: trees with a leading layer axis.
    """
    layers = len(jax.tree.leaves(params)[0])

    def body(i: Array, carry: tuple[PyTree[Array], PyTree[Array]]) -> tuple[PyTree[Array], PyTree[Array]]:
        x, weights = carry
        # The last block's again at the end: one superfluous copy, which spares a second program for it.
        following = one_block(params, jnp.minimum(i + 1, layers - 1))
        return step(x, (weights, one_block(inputs, i))), following

    return jax.lax.fori_loop(0, layers, body, (x, one_block(params, 0)))[0]


def map_from_host(function: Callable[[PyTree[Array]], PyTree[Array]], params: PyTree[Array]) -> PyTree[Array]:
    """function(one block's weights) of all blocks, stacked. params: a tree with a leading layer axis."""
    layers = len(jax.tree.leaves(params)[0])
    return jax.lax.map(lambda i: function(one_block(params, i)), jnp.arange(layers))
