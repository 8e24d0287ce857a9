"""The programs that `aot_memory` compiles: one block of a causal Wan2.1 model, for a GPU that need not be there."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from x2v_jax.diffusion.kv_cache import KVCache
from x2v_jax.diffusion.rollout import Rollout
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.models.config import WanConfig
from x2v_jax.models.networks import abstract_network

_SIZES = {
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
_LATENT_SIZE = (60, 104)
_BLOCK = 3
_SIGMAS = (1.0, 0.9375, 0.8333, 0.625)


class Case(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def window(self) -> int: ...
    @property
    def sink(self) -> int: ...
    @property
    def cache_dtype(self) -> str: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Unused(KVCache):
    """A cache that nothing is written to or read from."""

    def write(self, layer: Any, keys: Any, values: Any, start_frame: Any) -> Self:
        return self

    def attend(self, layer: Any, q: Any, end_frame: Any, **how: Any) -> Any:
        return q


def without_attention(cache: KVCache) -> KVCache:
    return _Unused(cache.k, cache.v, cache.sink_k, cache.layout)


def compile_block(
    case: Case, target: str, change: Callable[[KVCache], KVCache] = lambda cache: cache
) -> tuple[Any, KVCache]:
    """(Rollout.block compiled for a target, in the text form of XLA's GpuTargetConfigProto; its cache, in shapes)."""
    rollout, params = make_rollout(case)
    cache = change(jax.eval_shape(rollout.empty_cache))
    text = jax.ShapeDtypeStruct((1, rollout.config.text_len, rollout.config.text_dim), jnp.bfloat16)
    context = jax.eval_shape(rollout.prepare, params, text)
    latents = jax.ShapeDtypeStruct(rollout.shape(_BLOCK), jnp.float32)
    renoise = jax.ShapeDtypeStruct((len(_SIGMAS) - 1, *latents.shape), jnp.float32)
    number, timestep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (params, context, cache, latents, renoise, number, number, number, timestep)
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    there = jax.sharding.NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), jax.P())

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    block: Any = rollout.block
    return block.lower(*jax.tree.map(place, arguments)).compile(), cache


def make_rollout(case: Case) -> tuple[Rollout, Any]:
    """(a rollout at full size, its parameters in shapes)."""
    config = _SIZES[case.model]
    graphdef, params = abstract_network(config, param_dtype=jnp.bfloat16)
    plan = RolloutPlan(_SIGMAS, block=_BLOCK, mode="sliding", window=case.window, sink=case.sink)
    return Rollout(graphdef, config, plan, _LATENT_SIZE, cache_dtype=case.cache_dtype), params


def arrays_of(cache: KVCache) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(cache)
