"""A prompt that changes on the way: what the next block sees is shown again under the new one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, split
from x2v_jax.models.wan import WanModel

SIZE = (2, 4)
SIGMAS = (1.0, 0.6)
OLD, NEW = (jax.random.normal(jax.random.key(seed), (1, 5, 12)) for seed in (2, 4))
NOISE, RENOISE = keyed_noise(jax.random.key(3))


@pytest.fixture(scope="module")
def network():
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=12, text_len=5, freq_dim=16)
    graphdef, _ = abstract(lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    params = jax.jit(lambda: split(WanModel(config, rngs=nnx.Rngs(0)))[1])()
    head = params["head"]["linear"]
    head["kernel"] = 0.2 * jax.random.normal(jax.random.key(9), head["kernel"].shape)
    return graphdef, config, params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "at", "seen"),
    [
        (RolloutPlan(SIGMAS, 2, "full", 8), 4, [(0, 4)]),
        (RolloutPlan(SIGMAS, 2, "sliding", 6), 2, [(0, 2)]),
        (RolloutPlan(SIGMAS, 2, "sliding", 6), 8, [(4, 8)]),
        (RolloutPlan(SIGMAS, 2, "sliding", 6, sink=2), 8, [(0, 2), (6, 8)]),
        (RolloutPlan(SIGMAS, 2, "sliding", 8, sink=1), 10, [(0, 2), (6, 10)]),
        (RolloutPlan(SIGMAS, 2, "fragments", 6), 4, [(0, 4)]),
        (RolloutPlan(SIGMAS, 2, "fragments", 6), 6, [(4, 6)]),
        (RolloutPlan(SIGMAS, 2, "fragments", 6), 8, [(4, 8)]),
    ],
    ids=["full", "growing", "sliding", "sink", "part_of_a_block", "fragment", "between_fragments", "second_fragment"],
)
def test_the_next_block_is_that_of_a_video_which_goes_on_from_what_is_seen(network, plan, at, seen):
    graphdef, config, params = network
    rollout = Rollout(graphdef, config, plan, SIZE, cache_dtype=jnp.float32)
    old, new = (rollout.prepare(params, text) for text in (OLD, NEW))
    asked: list[int] = []

    def change(frames: int):
        asked.append(frames)
        return new if frames == at else None

    video = np.concatenate(
        list(rollout.stream(params, old, NOISE, RENOISE, min(at + 4, 8 if plan.mode == "full" else 99), change=change)),
        axis=1,
    )
    assert asked == list(range(0, video.shape[1], 2)) and rollout.block._cache_size() == 1
    plain = np.concatenate(list(rollout.stream(params, old, NOISE, RENOISE, at + 2)), axis=1)
    np.testing.assert_array_equal(video[:, :at], plain[:, :at])
    assert np.abs(video[:, at : at + 2] - plain[:, at:]).max() > 1e-4

    given = np.concatenate([video[:, start:stop] for start, stop in seen], axis=1)
    fresh = rollout.stream(
        params,
        new,
        lambda block, shape: NOISE(block + (at - given.shape[1]) // 2, shape),
        lambda block, steps, shape: RENOISE(block + (at - given.shape[1]) // 2, steps, shape),
        given.shape[1] + 2,
        given=given,
    )
    np.testing.assert_allclose(next(fresh), video[:, at : at + 2], atol=2e-5)


def test_the_video_goes_on_after_a_change(network):
    """The blocks after the first of a new prompt see it in turn, and forget as before."""
    graphdef, config, params = network
    rollout = Rollout(graphdef, config, RolloutPlan(SIGMAS, 2, "sliding", 6), SIZE, cache_dtype=jnp.float32)
    old, new = (rollout.prepare(params, text) for text in (OLD, NEW))
    changes = {8: new}
    video = np.concatenate(list(rollout.stream(params, old, NOISE, RENOISE, 16, change=changes.get)), axis=1)
    fresh = rollout.stream(
        params,
        new,
        lambda block, shape: NOISE(block + 2, shape),
        lambda block, steps, shape: RENOISE(block + 2, steps, shape),
        12,
        given=video[:, 4:8],
    )
    np.testing.assert_allclose(np.concatenate(list(fresh), axis=1), video[:, 8:], atol=1e-4)
