"""Blocks whose weights wait in the host's memory give what they give on the device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from x2v_jax.models import functional
from x2v_jax.models.host_blocks import map_from_host, one_block, scan_from_host, with_blocks_on_host
from x2v_jax.models.wan import WanModel

HOST = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def offloaded(params: functional.Params) -> functional.Params:
    return params | {"blocks": jax.tree.map(lambda leaf: jax.device_put(leaf, HOST), params["blocks"])}


def test_every_block_comes_once_and_in_order():
    weights = {"a": jnp.arange(5.0)[:, None] * jnp.ones((5, 3)), "b": jnp.arange(5.0)}
    there = jax.device_put(weights, HOST)

    def run(params: object) -> jax.Array:
        step = lambda x, layer: x * 10 + layer[0]["b"] + 0 * layer[0]["a"].sum() + layer[1]  # noqa: E731
        return scan_from_host(step, jnp.float32(0), params, jnp.full((5,), 1.0))

    assert jax.jit(run)(there) == 12345
    np.testing.assert_array_equal(jax.jit(lambda p: map_from_host(lambda w: 2 * w["b"], p))(there), 2 * np.arange(5.0))
    np.testing.assert_array_equal(jax.jit(one_block)(there, 3)["a"], np.full(3, 3.0))


def copies(function: object, *arguments: object) -> int:
    """To the device, in a program for GPUs: on CPU there is one memory, and nothing to be seen."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))  # type: ignore[arg-type]
    return lowered.as_text().count("@annotate_device_placement")


@pytest.mark.slow
def test_a_network_with_blocks_on_the_host_gives_the_same_velocity_and_keys():
    model = WanModel(tiny_models.I2V, rngs=nnx.Rngs(0), dtype=jnp.float32)
    graphdef, params = functional.split(model)
    on_host, _ = functional.split(with_blocks_on_host(model))
    keys = jax.random.split(jax.random.key(0), 3)
    latents = jax.random.normal(keys[0], (1, 2, 4, 6, 36))
    text = jax.random.normal(keys[1], (1, tiny_models.I2V.text_len, tiny_models.I2V.text_dim))
    image = jax.random.normal(keys[2], (1, 5, tiny_models.I2V.clip_dim))

    def velocity(graphdef: Any, params: functional.Params) -> jax.Array:
        return functional.merge(graphdef, params)(latents, jnp.full((1,), 500.0), text, image)

    def cross_keys(graphdef: Any, params: functional.Params) -> Any:
        return functional.merge(graphdef, params).cross_keys(text, image)

    blocks = params["blocks"]
    leaves, cross = (len(jax.tree.leaves(tree)) for tree in (blocks, blocks["cross_attn"]))
    # Every weight of a block, of the first and of the following one; for the keys those of cross attention that count.
    for function, most in ((velocity, 2 * leaves), (cross_keys, cross)):
        there, here = functools.partial(function, on_host), functools.partial(function, graphdef)
        for own, other in zip(
            *(jax.tree.leaves(x) for x in (jax.jit(here)(params), jax.jit(there)(offloaded(params)))), strict=True
        ):
            np.testing.assert_array_equal(own, other)
        assert copies(here, params) == 0 < copies(there, offloaded(params)) <= most
