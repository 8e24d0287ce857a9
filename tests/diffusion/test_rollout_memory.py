"""A video of any length in the memory of a window: nothing is copied, and nothing is kept of what was made."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.aot.hlo import arrays_made
from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, split
from x2v_jax.models.wan import WanModel
from x2v_jax.ops.attention import in_parts

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=3, text_dim=12, text_len=5, freq_dim=16)
SIZE = (4, 4)
TOKENS = 4


def _model(dtype=jnp.float32) -> WanModel:
    return WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)


def _rollout(window: int, **arguments) -> Rollout:
    plan = RolloutPlan((1.0, 0.5), block=2, mode="sliding", window=window, sink=arguments.pop("sink", 0))
    graphdef, _ = abstract(_model)
    return Rollout(graphdef, CONFIG, plan, SIZE, **arguments)


def _compiled(rollout: Rollout):
    _, params = abstract(_model)
    latents = jax.ShapeDtypeStruct(rollout.shape(2), jnp.float32)
    context = jax.eval_shape(rollout.prepare, params, jax.ShapeDtypeStruct((1, 5, 12), jnp.float32))
    cache = jax.eval_shape(rollout.empty_cache)
    noise = jax.ShapeDtypeStruct((1, *latents.shape), jnp.float32)
    number, timestep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    lowered = rollout.block.lower(params, context, cache, latents, noise, number, number, number, timestep)
    return lowered.compile(), jax.tree.leaves(cache)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_parts, "_FEW_BYTES", 0)
    monkeypatch.setattr(in_parts, "_ROWS", 16)


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "dtype"), [(0, "float32"), (2, "bfloat16"), (2, "int8")])
def test_the_cache_is_updated_where_it_lies(small_parts, sink: int, dtype: str):
    compiled, cache = _compiled(_rollout(500, sink=sink, cache_dtype=dtype))
    memory, rows = compiled.memory_analysis(), 500 * TOKENS
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in cache)
    made = [x for x in arrays_made(compiled.as_text()) if not x.updates]
    assert not {x.shape for x in made} & {x.shape for x in cache if x.shape[2] == rows}
    # Nor a layer's rows, nor scores of them.
    assert max(max(x.shape, default=0) for x in made) < rows
    assert memory.temp_size_in_bytes < rows * CONFIG.dim


def test_temporaries_do_not_grow_with_the_window(small_parts):
    few, many = (_compiled(_rollout(window, cache_dtype=jnp.float32))[0] for window in (50, 500))
    assert few.memory_analysis().temp_size_in_bytes == many.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_ten_times_the_length_costs_not_one_byte_more():
    rollout = _rollout(6, sink=2, cache_dtype=jnp.float32)
    params = jax.jit(lambda: split(_model())[1])()
    context = rollout.prepare(params, jnp.ones((1, 5, 12)))
    noise, renoise = keyed_noise(jax.random.key(0))

    def bytes_held(num_frames: int) -> list[int]:
        gc.collect()
        held, before = [], sum(x.nbytes for x in jax.live_arrays())
        for latents in rollout.stream(params, context, noise, renoise, num_frames):
            np.asarray(latents)
            held.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return held

    short, long = bytes_held(6), bytes_held(60)
    assert len(long) == 10 * len(short)
    assert max(long) == max(short)
    assert rollout.block._cache_size() == 1
