"""Rollouts of training: the videos are those of inference, and the gradient is that of the exit steps alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.data.sources import Batch, Conditions
from train.rollouts import BlockByBlock, NoisedVideos, WholeVideo, sample_keys
from x2v_jax.diffusion import step_distill
from x2v_jax.diffusion.flow import add_noise, x0_from_velocity
from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.diffusion.noise import block_noise, initial_noise, step_noise
from x2v_jax.diffusion.rollout import Rollout
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import merge, split
from x2v_jax.models.wan import WanModel

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=4)
SHAPE = (4, 4, 4, 16)
SIGMAS = (1.0, 0.8, 0.5)
BATCH = 2


def model_params(config: WanConfig = CONFIG, remat: Any = "none") -> tuple[Any, Any]:
    graph, params = split(WanModel(config, rngs=nnx.Rngs(3), dtype=jnp.float32, remat=remat))
    # The head of a new model is zero, and would hide everything.
    head = params["head"]["linear"]["kernel"]
    params["head"]["linear"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(4), head.shape)
    return graph, params


@pytest.fixture(scope="module")
def batch() -> Batch:
    text = np.asarray(jax.random.normal(jax.random.key(5), (BATCH, 4, 8)))
    latents = np.asarray(jax.random.normal(jax.random.key(6), (BATCH, *SHAPE)))
    return Batch(Conditions(text), np.arange(BATCH, dtype=np.int32), latents)


def keys() -> Any:
    return sample_keys(jax.random.key(7), jnp.arange(BATCH))


def leaves_close(a: Any, b: Any, tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


@pytest.mark.slow
@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_a_whole_video_is_what_the_sampler_makes_up_to_the_exit_step(batch: Batch, exit_step: int):
    graph, params = model_params()
    rollout = WholeVideo(graph, SHAPE, SIGMAS)
    model, text = merge(graph, params), batch.conditions.text

    def velocity(x: Any, t: Any) -> Any:
        return model(x, jnp.full((BATCH,), t), text)

    noise = jax.vmap(lambda key: initial_noise(key, SHAPE))(keys())
    # A sampler that ends at the exit step returns its x0.
    expected = step_distill.sample(
        velocity,
        noise,
        np.asarray(SIGMAS[: exit_step + 1], np.float32),
        lambda i: jax.vmap(lambda key: step_noise(key, i, SHAPE))(keys()),
    )
    x0 = jax.jit(rollout.videos)(params, batch, keys(), jnp.int32(exit_step))
    np.testing.assert_allclose(x0, expected, atol=2e-5)


@pytest.mark.slow
def test_the_gradient_of_a_whole_video_is_that_of_its_last_evaluation(batch: Batch):
    graph, params = model_params()
    rollout = WholeVideo(graph, SHAPE, SIGMAS)
    direction = jax.random.normal(jax.random.key(8), (BATCH, *SHAPE))
    text = batch.conditions.text

    def plain(params: Any) -> Any:
        x = jax.vmap(lambda key: initial_noise(key, SHAPE))(keys())
        for i in range(2):
            t = jnp.full((BATCH,), 1000 * SIGMAS[i])
            x0 = x0_from_velocity(
                x, merge(graph, jax.lax.stop_gradient(params))(x, t, text), jnp.full(BATCH, SIGMAS[i])
            )
            noise = jax.vmap(lambda key, i=i: step_noise(key, i, SHAPE))(keys())
            x = add_noise(x0, noise, jnp.full(BATCH, SIGMAS[i + 1]))
        velocity = merge(graph, params)(x, jnp.full((BATCH,), 1000 * SIGMAS[2]), text)
        return jnp.sum(direction * x0_from_velocity(x, velocity, jnp.full(BATCH, SIGMAS[2])))

    expected = jax.jit(jax.grad(plain))(params)
    pull = jax.jit(lambda p: rollout.videos_and_pullback(p, batch, keys(), jnp.int32(2))[1](direction))
    leaves_close(pull(params), expected, 1e-5)


def causal_rollout(graph: Any, window: int | None = None) -> BlockByBlock:
    return BlockByBlock(graph, CONFIG, SHAPE, SIGMAS, block=2, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("given", [0, pytest.param(2, marks=pytest.mark.long)])
def test_blocks_are_those_of_inference(batch: Batch, given: int):
    graph, params = model_params()
    plan = RolloutPlan(SIGMAS, block=2, window=4, mode="sliding")
    before = jax.random.normal(jax.random.key(9), (BATCH, 2 * given, *SHAPE[1:])) if given else None
    inference = Rollout(graph, CONFIG, plan, SHAPE[1:3], batch=BATCH, cache_dtype=jnp.float32)

    def noise(block: int, shape: Any) -> Any:
        return jax.vmap(lambda key: block_noise(key, block - given, shape[1:]))(keys())

    def renoise(block: int, steps: int, shape: Any) -> Any:
        return jnp.stack(
            [jax.vmap(lambda key, i=i: step_noise(key, i, shape[1:], block - given))(keys()) for i in range(steps - 1)]
        )

    context = inference.prepare(params, batch.conditions.text)
    frames = SHAPE[0] + 2 * given
    blocks = inference.stream(params, context, noise, renoise, frames, given=before)
    expected = jnp.concatenate(list(blocks), axis=1)
    x0 = jax.jit(causal_rollout(graph).videos)(params, batch._replace(given=before), keys(), jnp.int32(2))
    np.testing.assert_allclose(x0, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "given", "window"),
    [
        ("none", 1, 4),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("none", 0, 4), ("attention", 0, 4), ("block", 0, 4))
        ),
        pytest.param("block", 2, 4, marks=pytest.mark.long),
    ],
)
def test_the_gradient_block_by_block_is_that_of_plain_autodiff_with_a_detached_cache(
    batch: Batch, remat: str, given: int, window: int
):
    """With given blocks the last block no longer sees the first ones: the cache is a ring of the window's length."""
    graph, params = model_params(remat=remat)
    before = jax.random.normal(jax.random.key(9), (BATCH, 2 * given, *SHAPE[1:])) if given else None
    batch = batch._replace(given=before)
    direction = jax.random.normal(jax.random.key(8), (BATCH, *SHAPE))
    exit_step = 1

    def plain(params: Any) -> Any:
        frozen = merge(graph, jax.lax.stop_gradient(params))
        model = merge(graph, params)
        cache = KVCache.empty(CONFIG, CacheLayout(window, 4), BATCH, jnp.float32)
        total = 0.0
        for block in range(given):
            context = frozen.cross_keys(batch.conditions.text)
            shown = before[:, 2 * block : 2 * block + 2]
            _, cache = frozen.with_cache(shown, jnp.zeros(BATCH), context, cache, jnp.int32(2 * block))
        for block in range(2):
            start, shape = jnp.int32(2 * (given + block)), (2, *SHAPE[1:])
            x = jax.vmap(lambda key, b=block, s=shape: block_noise(key, b, s))(keys())
            for i in range(exit_step + 1):
                of = model if i == exit_step else frozen
                context = of.cross_keys(batch.conditions.text)
                velocity, cache = of.with_cache(x, jnp.full(BATCH, 1000 * SIGMAS[i]), context, cache, start)
                x0 = x0_from_velocity(x, velocity, jnp.full(BATCH, SIGMAS[i]))
                if i < exit_step:
                    added = jax.vmap(lambda key, i=i, b=block, s=shape: step_noise(key, i, s, b))(keys())
                    x = add_noise(x0, added, jnp.full(BATCH, SIGMAS[i + 1]))
            total += jnp.sum(direction[:, 2 * block : 2 * block + 2] * x0)
            # The cache is detached: neither the clean pass nor what it saw is differentiated.
            context = frozen.cross_keys(batch.conditions.text)
            _, cache = frozen.with_cache(jax.lax.stop_gradient(x0), jnp.zeros(BATCH), context, cache, start)
            cache = jax.lax.stop_gradient(cache)
        return total

    expected = jax.jit(jax.grad(plain))(params)
    rollout = causal_rollout(graph, window)
    pull = jax.jit(lambda p: rollout.videos_and_pullback(p, batch, keys(), jnp.int32(exit_step))[1](direction))
    leaves_close(pull(params), expected, 1e-5)


@pytest.mark.slow
def test_noised_videos_have_a_level_in_each_block_and_clean_blocks_stay_as_they_are(batch: Batch):
    graph, params = model_params()
    rollout = NoisedVideos(graph, SHAPE, SIGMAS, block=2)
    many = jax.tree.map(lambda x: np.repeat(x[:1], 64, axis=0), batch)
    noisy, sigma = rollout._noised(many, sample_keys(jax.random.key(0), jnp.arange(64)))
    assert np.array_equal(sigma[:, 0], sigma[:, 1]) and np.array_equal(sigma[:, 2], sigma[:, 3])
    assert set(np.unique(np.round(np.asarray(sigma), 4))) == {0.0, *np.float32(np.round(SIGMAS, 4))}
    assert len({tuple(row) for row in np.asarray(sigma[:, ::2])}) > 8  # blocks draw apart
    clean = np.asarray(sigma == 0)
    x0 = jax.jit(rollout.videos)(params, many, sample_keys(jax.random.key(0), jnp.arange(64)), jnp.int32(0))
    np.testing.assert_array_equal(np.asarray(noisy)[clean], many.latents[clean])
    np.testing.assert_array_equal(np.asarray(x0)[clean], many.latents[clean])


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch(batch: Batch):
    graph, params = model_params()
    rollout = WholeVideo(graph, SHAPE, SIGMAS)
    whole = rollout.videos(params, batch, keys(), jnp.int32(1))
    second = jax.tree.map(lambda x: x[1:], batch)
    alone = rollout.videos(params, second, sample_keys(jax.random.key(7), jnp.asarray(second.sample)), jnp.int32(1))
    np.testing.assert_allclose(alone[0], whole[1], atol=1e-5)
