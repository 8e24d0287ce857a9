"""Rollouts with a cache against rollouts that run the whole clip under the block mask, at every step anew."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import MAX_FRAMES, RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, merge, split
from x2v_jax.models.wan import WanModel
from x2v_jax.ops.attention import in_parts

SIZE = (2, 4)
SIGMAS = (1.0, 0.6)
TEXT = jax.random.normal(jax.random.key(2), (1, 5, 12))
NOISE, RENOISE = keyed_noise(jax.random.key(3))


def _network(num_layers: int):
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=num_layers, text_dim=12, text_len=5, freq_dim=16)
    graphdef, _ = abstract(lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    params = jax.jit(lambda: split(WanModel(config, rngs=nnx.Rngs(0)))[1])()
    head = params["head"]["linear"]
    head["kernel"] = 0.2 * jax.random.normal(jax.random.key(9), head["kernel"].shape)
    return graphdef, config, params


@pytest.fixture(scope="module")
def two_layers():
    return _network(2)


@pytest.fixture(scope="module")
def one_layer():
    return _network(1)


class _Run:
    """A Rollout with its parameters and context."""

    def __init__(self, network, plan: RolloutPlan, cache_dtype: str = "float32"):
        graphdef, config, self.params = network
        self.rollout = Rollout(graphdef, config, plan, SIZE, cache_dtype=cache_dtype)
        self.context = self.rollout.prepare(self.params, TEXT)

    def __call__(self, num_frames, noise=NOISE, renoise=RENOISE, **arguments) -> np.ndarray:
        blocks = self.rollout.stream(self.params, self.context, noise, renoise, num_frames, **arguments)
        return np.concatenate(list(blocks), axis=1)

    @property
    def compilations(self) -> int:
        return self.rollout.block._cache_size()


def _dense_rollout(network, plan: RolloutPlan, num_frames: int) -> np.ndarray:
    """What `stream` should make, without a cache: frames to come are zeros, which causality hides."""
    graphdef, _, params = network
    window = plan.window if plan.mode == "sliding" else None
    pattern = CausalPattern(plan.block, window, plan.sink, plan.independent_first_frame)
    length = plan.window if plan.mode == "fragments" else num_frames

    @jax.jit
    def velocity(latents, timestep):
        return merge(graphdef, params)(latents, timestep, TEXT, causal=pattern)

    shown, shown_at = np.zeros((1, length, *SIZE, 16), np.float32), np.zeros((1, length), np.float32)
    made, x = [], None
    for step in plan.steps(num_frames):
        place = np.s_[:, step.start_frame : step.start_frame + step.frames]
        context_timestep = plan.context_timestep
        if step.seed:
            shown[place] = x
            shown_at[place] = 1000 * plan.sigmas[-1] if context_timestep is None else context_timestep
            continue
        shape = (1, step.frames, *SIZE, 16)
        x = np.asarray(NOISE(step.block, shape))
        for i, sigma in enumerate(plan.sigmas):
            shown[place], shown_at[place] = x, 1000 * sigma
            x = x - sigma * np.asarray(velocity(shown, shown_at))[place]
            if i + 1 < plan.num_steps:
                after = plan.sigmas[i + 1]
                x = (1 - after) * x + after * np.asarray(RENOISE(step.block, plan.num_steps, shape)[i])
        if context_timestep is not None:
            shown[place], shown_at[place] = x, context_timestep
        made.append(x)
    return np.concatenate(made, axis=1)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "num_frames", "compilations"),
    [
        (RolloutPlan(SIGMAS, block=3, window=9), 9, 1),
        (RolloutPlan(SIGMAS, block=2, mode="sliding", window=4, context_timestep=80.0), 10, 1),
        (RolloutPlan(SIGMAS, 2, "sliding", 5, sink=1, positions="absolute", independent_first_frame=True), 9, 2),
        (RolloutPlan(SIGMAS, 3, "sliding", 7, sink=2, positions="absolute", context_timestep=None), 12, 1),
        (RolloutPlan(SIGMAS, block=2, mode="fragments", window=4), 8, 1),
        (RolloutPlan(SIGMAS, block=2, mode="fragments", window=6, context_timestep=None), 12, 1),
    ],
    ids=["full", "sliding", "sink", "noisy_keys", "fragments", "fragments_noisy_keys"],
)
def test_the_cache_changes_nothing(two_layers, plan: RolloutPlan, num_frames: int, compilations: int):
    run = _Run(two_layers, plan)
    assert _distance(run(num_frames), _dense_rollout(two_layers, plan, num_frames)) < 1e-5
    assert run.compilations == compilations


def test_neither_do_parts_of_it(two_layers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_parts, "_FEW_BYTES", 0)
    monkeypatch.setattr(in_parts, "_ROWS", 3)
    plan = RolloutPlan(SIGMAS, 3, "sliding", 7, sink=2, positions="absolute")
    assert _distance(_Run(two_layers, plan)(12), _dense_rollout(two_layers, plan, 12)) < 1e-5


@pytest.mark.parametrize("num_frames", [1, 3, 4])
def test_one_frame_a_block_and_one_frame_more_are_as_without_a_cache(one_layer, num_frames: int):
    plan = RolloutPlan(SIGMAS, block=3, window=7, independent_first_frame=num_frames != 3)
    assert _distance(_Run(one_layer, plan)(num_frames), _dense_rollout(one_layer, plan, num_frames)) < 1e-5


@pytest.mark.parametrize(("cache_dtype", "bound"), [("bfloat16", 0.01), ("int8", 0.02), ("int8_e4m3", 0.04)])
def test_a_narrow_cache_changes_a_video_of_five_blocks_by_as_much_as_stated(two_layers, cache_dtype, bound):
    plan = RolloutPlan(SIGMAS, block=2, mode="sliding", window=6, sink=2)
    exact = _Run(two_layers, plan)(10)
    distance = _distance(_Run(two_layers, plan, cache_dtype)(10), exact)
    assert 0 < distance < bound


def test_a_video_can_be_longer_than_any_table_at_two_compilations(one_layer):
    plan = RolloutPlan((1.0,), block=3, mode="sliding", window=6, independent_first_frame=True)
    run, frames = _Run(one_layer, plan), 1 + 3 * 345
    video = run(frames)
    assert video.shape == (1, frames, *SIZE, 16) and np.isfinite(video).all()
    assert run.compilations == 2
    # With one layer, a block is a function of its window: it comes out the same where that is all there ever was.
    short = _Run(one_layer, RolloutPlan((1.0,), block=3, window=6))
    last = short(6, lambda block, shape: NOISE(345, shape), given=video[:, -6:-3])
    np.testing.assert_allclose(last, video[:, -3:], atol=2e-5)


def test_a_relative_sink_is_as_near_as_if_the_window_had_always_followed_it(one_layer):
    frames = np.asarray(jax.random.normal(jax.random.key(5), (1, 40, *SIZE, 16)))
    near = np.concatenate([frames[:, :2], frames[:, -2:]], axis=1)

    def noise(block, shape):
        return NOISE(0, shape)

    expected = _Run(one_layer, RolloutPlan((1.0,), block=2, window=6))(6, noise, given=near)

    def far(positions):
        plan = RolloutPlan((1.0,), block=2, mode="sliding", window=6, sink=2, positions=positions)
        return _Run(one_layer, plan)(42, noise, given=frames)

    assert _distance(far("relative"), expected) < 1e-5
    assert _distance(far("absolute"), expected) > 1e-4


def test_a_run_goes_on_from_its_own_blocks(two_layers):
    run = _Run(two_layers, RolloutPlan(SIGMAS, block=2, mode="sliding", window=4))
    whole = run(8)
    np.testing.assert_array_equal(run(8, given=whole[:, :4]), whole[:, 4:])
    np.testing.assert_array_equal(run(2), whole[:, :2])
    endless = run.rollout.stream(run.params, run.context, NOISE, RENOISE)
    np.testing.assert_array_equal(np.concatenate(list(itertools.islice(endless, 4)), axis=1), whole)
    assert run.compilations == 1


def test_the_cache_is_not_copied(two_layers):
    run = _Run(two_layers, RolloutPlan(SIGMAS, block=2, window=4))
    cache, x = run.rollout.empty_cache(), jnp.zeros(run.rollout.shape(2))
    arguments = (x, x[None], np.int32(0), np.int32(0), np.int32(3), np.float32(0))
    _, after = run.rollout.block(run.params, run.context, cache, *arguments)
    assert cache.k.is_deleted() and cache.v.is_deleted()
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, run.rollout.empty_cache())


def test_given_frames_of_another_size_or_number_are_refused(two_layers):
    run = _Run(two_layers, RolloutPlan(SIGMAS, block=2, mode="sliding", window=4))
    for shape, message in [
        ((1, 2, 4, 4, 16), "the given latents have shape"),
        ((1, 3, *SIZE, 16), "3 latent frames are given"),
        ((1, 4, *SIZE, 16), "4 latent frames are given and num_frames is 4"),
    ]:
        with pytest.raises(UserError, match=message):
            run(4, given=np.zeros(shape, np.float32))


@pytest.mark.usefixtures("without_type_checks")
def test_networks_and_sizes_that_do_not_fit_are_refused():
    plan = RolloutPlan(SIGMAS)
    base = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1}
    with pytest.raises(UserError, match="text-to-video"):
        Rollout(None, WanConfig(**base, model_type="i2v", in_dim=36), plan, SIZE)
    with pytest.raises(UserError, match="do not split"):
        Rollout(None, WanConfig(**base), plan, (3, 4))


def test_noise_differs_by_block_and_step_and_from_nothing_else():
    shape = (1, 2, *SIZE, 16)
    draws = [NOISE(block, shape) for block in range(3)] + [x for block in range(3) for x in RENOISE(block, 3, shape)]
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.3
    np.testing.assert_array_equal(keyed_noise(jax.random.key(3))[0](2, shape), draws[2])


@pytest.mark.parametrize(
    ("fields", "num_frames", "message"),
    [
        ({}, 1, "num_frames is 1 latent frames; .* a multiple of 3: give 3"),
        ({}, 2, "num_frames is 2"),
        ({}, 4, "give 3 or 6"),
        ({}, 0, "num_frames is 0"),
        ({}, 24, r"mode 'full' keeps 21"),
        ({}, None, "mode 'full' ends after 21"),
        ({"independent_first_frame": True}, 3, r"1 \+ a multiple of 3: give 1 or 4"),
        ({"mode": "sliding"}, 3 * MAX_FRAMES, "exact up to"),
    ],
)
def test_lengths_that_are_not_whole_blocks_or_too_long_are_refused(fields, num_frames, message):
    with pytest.raises(UserError, match=message):
        RolloutPlan(SIGMAS, **fields).steps(num_frames)


def test_a_block_and_a_block_after_a_first_frame_are_lengths():
    assert [step.frames for step in RolloutPlan(SIGMAS).steps(3)] == [3]
    alone = RolloutPlan(SIGMAS, independent_first_frame=True)
    assert [step.frames for step in alone.steps(1)] == [1]
    assert [(s.start_frame, s.frames, s.keep) for s in alone.steps(4)] == [(0, 1, True), (1, 3, False)]


def test_fragments_overlap_by_one_block():
    steps = list(RolloutPlan(SIGMAS, mode="fragments", window=6).steps(12))
    assert [(s.block, s.start_frame, s.seed, s.keep) for s in steps] == [
        (0, 0, False, True),
        (1, 3, False, False),
        (1, 0, True, True),
        (2, 3, False, False),
        (2, 0, True, True),
        (3, 3, False, False),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "rolling"}, "mode is 'rolling'; choose 'full'"),
        ({"positions": "none"}, "positions is 'none'"),
        ({"sigmas": ()}, "sigmas is"),
        ({"sigmas": (0.5, 0.5)}, "must fall"),
        ({"sigmas": (1.5, 0.5)}, "at most 1"),
        ({"context_timestep": -1.0}, "context_timestep is -1"),
        ({"context_timestep": float("nan")}, "context_timestep is nan"),
        ({"sink": 3}, "sink is 3 in mode 'full'"),
        ({"mode": "sliding", "window": 5, "sink": 3}, "window is 5"),
        ({"mode": "fragments", "window": 7}, "window is 7"),
        ({"mode": "fragments", "window": 3}, "window is 3"),
        ({"mode": "fragments", "independent_first_frame": True}, "independent_first_frame"),
    ],
)
def test_plans_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RolloutPlan(**{"sigmas": SIGMAS, **fields})
