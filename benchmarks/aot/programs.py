"""What is compiled for a GPU that need not be there, from shapes alone: one block of a causal Wan2.1 model (`memory`),
and all steps of a distilled one as one program (`sampler`)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from x2v_jax.diffusion.kv_cache import KVCache
from x2v_jax.diffusion.rollout import Rollout
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import Loop, step_sigmas
from x2v_jax.generate.denoise import Conditions, Denoiser
from x2v_jax.generate.programs import Program
from x2v_jax.models.config import ClipConfig, VaeConfig, WanConfig
from x2v_jax.models.networks import abstract_network

_SIZES = {
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
_LATENT_SIZE = (60, 104)
_BLOCK = 3
_SIGMAS = (1.0, 0.9375, 0.8333, 0.625)

CONFIGS: dict[str, Callable[[], WanConfig]] = {
    "T2V-1.3B": WanConfig.t2v_1_3b,
    "T2V-14B": WanConfig.t2v_14b,
    "I2V-14B": WanConfig.i2v_14b,
}
PIXELS = {"480P": (480, 832), "720P": (720, 1280)}
FRAMES = 81
STEP_LIST, SHIFT = (1000, 750, 500, 250), 5.0


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


def latent_shape(size: str, frames: int = FRAMES) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents."""
    vae, (height, width) = VaeConfig(), PIXELS[size]
    return (frames - 1) // vae.temporal_stride + 1, height // vae.spatial_stride, width // vae.spatial_stride


def sampler_program(
    config: WanConfig,
    latents: tuple[int, int, int],
    *,
    quantization: str | None = None,
    ops: Any = None,
    loop: Loop = "unrolled",
) -> Program:
    """The four steps from noise to latents as `Denoiser` compiles them, weights in bfloat16 or, quantized, in 8 bits.

    Args:
        latents: frames, rows and columns.
        quantization: None, "int8" or "float8_e4m3fn".
        ops: the network's `OpChoice`; None: the default one.
        loop: how the steps are one program.
    """
    options: dict[str, Any] = {"param_dtype": jnp.bfloat16}
    options |= {} if quantization is None else {"quantization": quantization}
    options |= {} if ops is None else {"ops": ops}
    graphdef, params = abstract_network(config, **options)
    sigmas = step_sigmas(STEP_LIST, SHIFT, warp=True)
    shape = (1, *latents, config.out_dim)
    programs = Denoiser(graphdef, loop=loop).programs(params, conditions(config, latents), shape, sigmas, watched=False)
    return next(program for program in programs if program.name == "denoising")


def conditions(config: WanConfig, latents: tuple[int, int, int]) -> Conditions:
    """Shapes of what a video of this size is made from."""
    text: Any = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.float32)
    scale: Any = jax.ShapeDtypeStruct((), np.float32)
    if config.model_type == "t2v":
        return Conditions(text, scale)
    clip = ClipConfig()
    tokens = (clip.image_size // clip.patch_size) ** 2 + 1
    features: Any = jax.ShapeDtypeStruct((1, tokens, config.clip_dim), jnp.float32)
    image: Any = jax.ShapeDtypeStruct((1, *latents, config.in_dim - config.out_dim), jnp.float32)
    return Conditions(text, scale, features, image)
