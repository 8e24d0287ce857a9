"""The Fréchet distance between sets of tiny-world videos."""

import jax
import numpy as np
import pytest

from benchmarks.tiny_world import frechet
from train.shapes import world
from x2v_jax.media.pixels import to_uint8


@pytest.fixture(scope="module")
def real():
    return to_uint8(np.asarray(jax.jit(world.render)(world.sample_scenes(jax.random.key(5), 160))))


@pytest.fixture(scope="module")
def measured(real):
    return frechet.feature_matrix(real)


def test_the_distance_of_gaussians_is_the_known_one():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2))
    b = rng.normal(size=(200_000, 2)) * [2.0, 1.0] + [3.0, 0.0]
    assert frechet.frechet_distance(a, b) == pytest.approx(9.0 + 1.0, rel=0.02)
    # Rotated together, so that the covariances are not diagonal.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet.frechet_distance(a @ turn, b @ turn) == pytest.approx(10.0, rel=0.02)


@pytest.mark.slow
def test_a_set_is_at_no_distance_from_itself_and_the_distance_is_symmetric(measured):
    assert frechet.frechet_distance(measured, measured) == pytest.approx(0.0, abs=1e-6)
    there, back = (
        frechet.frechet_distance(*pair) for pair in ((measured[:80], measured[80:]), (measured[80:], measured[:80]))
    )
    assert there == pytest.approx(back, rel=1e-6)


@pytest.mark.slow
def test_features_are_finite_and_of_the_order_of_their_units(measured):
    assert measured.shape == (160, len(frechet.FEATURES))
    assert np.isfinite(measured).all()
    assert np.abs(measured.mean(0)).max() < 1.5 and measured.std(0).max() < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flaw", "feature"),
    [
        (lambda v, rng: np.clip(v + rng.normal(0, 12, v.shape), 0, 255).astype(np.uint8), "flicker"),
        (lambda v, rng: v[rng.permutation(len(v))], "jerk"),
        (lambda v, rng: (v * 0.6).astype(np.uint8), "chroma"),
        (lambda v, rng: v[np.arange(len(v)) // 2], "travel_x"),
        (lambda v, rng: v[np.r_[:20, [0] * 13]] * 0 + 9 if rng.random() < 0.3 else v, "missing"),
    ],
    ids=["noise", "frames in disorder", "pale", "half as fast", "three in ten empty"],
)
def test_flaws_add_distance_and_are_named(real, measured, flaw, feature):
    rng = np.random.default_rng(0)
    flawed = frechet.feature_matrix(flaw(video, rng) for video in real[:80])
    floor = frechet.frechet_distance(measured[:80], measured[80:])
    # What is inserted differs from the very videos that were spoilt, so chance has no part in it.
    assert frechet.frechet_distance(flawed, measured[80:]) > floor + 0.15
    assert feature in dict(frechet.largest_differences(flawed, measured[:80]))


def test_few_different_videos_are_farther_away_than_many(measured):
    collapsed = measured[:80][np.arange(80) % 4]
    assert (
        frechet.frechet_distance(collapsed, measured[80:]) > frechet.frechet_distance(measured[:80], measured[80:]) + 1
    )
    groups = np.arange(80) % 4
    assert frechet.diversity(collapsed, list(groups)) == pytest.approx(0.0, abs=1e-9)
    assert frechet.diversity(measured[:80], list(groups)) > 0.7


def test_sets_too_small_are_refused(measured):
    with pytest.raises(ValueError, match="at least two"):
        frechet.frechet_distance(measured[:1], measured)
    assert np.isnan(frechet.diversity(measured[:2], ["a", "b"]))
