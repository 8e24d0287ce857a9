"""The judge of the tiny world: right on real videos, not taken in by wrong ones."""

import jax
import numpy as np
import pytest

from train.shapes import judge, world
from train.shapes.world import matching_scenes
from x2v_jax.media.pixels import to_uint8

FRAMES = 33
RED, BLUE = (230, 26, 26), (33, 64, 242)
DARK, LIGHT = 15, 204


def circle(x, y, r):
    return np.hypot(x, y) - r


def square(x, y, r):
    return np.maximum(abs(x), abs(y)) - 0.92 * r


def triangle(x, y, r):
    return np.maximum((2 * abs(x) - (y + r)) / np.sqrt(5), y - r)


def draw(outline, x, y, colour=RED, background=DARK, onto=None, radius=10.0):
    """A video of an outline moving along x, y (arrays [F]); every argument may be a function of the frame's number."""
    rows, columns = np.mgrid[:64, :64] + 0.5
    frames = []
    for i in range(len(x)):
        of = lambda value, i=i: value(i) if callable(value) else value  # noqa: E731
        distance = (
            outline(i)(columns - x[i], rows - y[i], radius)
            if outline in MORPHS
            else outline(columns - x[i], rows - y[i], of(radius))
        )
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        behind = of(background) if onto is None else onto[i].astype(float)
        frames.append(cover * np.array(of(colour)) + (1 - cover) * behind)
    return np.round(np.stack(frames)).astype(np.uint8)


def sudden(i):
    return circle if i < FRAMES // 2 else square


def late(i):
    return circle if i < 24 else triangle


def gradual(i):
    share = i / (FRAMES - 1)
    return lambda x, y, r: (1 - share) * circle(x, y, r) + share * triangle(x, y, r)


MORPHS = (sudden, late, gradual)
ACROSS = np.linspace(15, 48, FRAMES)
STILL = np.full(FRAMES, 32.0)
RIGHT = ("red", "circle", "right")


@pytest.fixture(scope="module")
def real():
    scenes = world.sample_scenes(jax.random.key(11), 320)
    return to_uint8(np.asarray(jax.jit(world.render)(scenes))), scenes


def test_knows_the_words_of_the_world():
    assert (judge.COLOURS, judge.SHAPES, judge.DIRECTIONS) == (world.COLOURS, world.SHAPES, world.DIRECTIONS)


def test_every_real_video_is_judged_right(real):
    videos, scenes = real
    result = judge.score(videos, scenes)
    assert result["n"] == 320
    assert result["colour"] == result["shape"] == result["direction"] == result["all"] == result["found"] == 1.0
    assert result["jerk"] < 0.02 and result["size_variation"] < 0.002


def test_videos_against_other_labels_score_at_chance(real):
    videos, _ = real
    verdicts = [judge.judge(video) for video in videos[:96]]
    rng = np.random.default_rng(0)
    wanted = [tuple(rng.integers((4, 3, 4))) for _ in range(96 * 30)]
    result = judge.summarize(verdicts * 30, wanted)
    assert result["colour"] == pytest.approx(1 / 4, abs=0.04)
    assert result["shape"] == pytest.approx(1 / 3, abs=0.04)
    assert result["direction"] == pytest.approx(1 / 4, abs=0.04)
    assert result["all"] == pytest.approx(1 / 48, abs=0.015)


def _blurred(video, width):
    axis = np.arange(-4 * width, 4 * width + 1)
    kernel = np.exp(-0.5 * (axis / width) ** 2)
    soft = np.pad(video.astype(float), ((0, 0), (4 * width,) * 2, (4 * width,) * 2, (0, 0)), mode="edge")
    for dim in (1, 2):
        soft = np.apply_along_axis(np.convolve, dim, soft, kernel / kernel.sum(), "valid")
    return np.round(soft).astype(np.uint8)


@pytest.mark.parametrize("width", [1, 2])
def test_blur_does_not_turn_squares_into_circles(real, width):
    videos, scenes = real
    soft = [_blurred(video[::4], width) for video in videos[:24]]
    assert judge.score(soft, judge.label_names(scenes)[:24])["all"] == 1.0


def test_noise_is_seen_through_and_measured_as_jerk(real):
    videos, scenes = real
    noisy = np.clip(videos[:24] + np.random.default_rng(0).normal(0, 10, videos[:24].shape), 0, 255).astype(np.uint8)
    result = judge.score(noisy, judge.label_names(scenes)[:24])
    assert result["all"] == 1.0
    assert result["jerk"] > 0.03


def test_the_drawings_of_this_file_are_right_when_nothing_is_wrong():
    for outline, name in ((circle, "circle"), (square, "square"), (triangle, "triangle")):
        for background in (DARK, LIGHT):
            assert judge.judge(draw(outline, ACROSS, STILL, background=background)).names == ("red", name, "right")
    assert judge.judge(draw(circle, STILL, ACROSS[::-1])).direction == "up"
    assert judge.judge(draw(circle, STILL, ACROSS)).direction == "down"
    assert judge.judge(draw(circle, ACROSS[::-1], STILL)).direction == "left"


def _wobbling_size(i):
    return 10 + 3 * np.sin(i)


WRONG = {
    "an empty picture": np.full((FRAMES, 64, 64, 3), DARK, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), np.uint8),
    "coloured all over": np.broadcast_to(np.uint8(RED), (FRAMES, 64, 64, 3)).copy(),
    "two blobs": draw(circle, ACROSS, STILL - 18, onto=draw(circle, ACROSS, STILL + 16)),
    "two blobs, one small": draw(circle, ACROSS, STILL - 18, onto=draw(circle, ACROSS, STILL + 16, radius=5)),
    "two blobs of two colours": draw(circle, ACROSS, STILL - 18, BLUE, onto=draw(circle, ACROSS, STILL + 16)),
    "no motion": draw(circle, STILL, STILL),
    "hardly any motion": draw(circle, np.linspace(29, 35, FRAMES), STILL),
    "the other way": draw(circle, ACROSS[::-1], STILL),
    "diagonal": draw(circle, ACROSS, ACROSS),
    "mostly right, a good deal down": draw(circle, ACROSS, np.linspace(20, 42, FRAMES)),
    "to and fro": draw(circle, np.r_[ACROSS[::2], ACROSS[::-2]][:FRAMES], STILL),
    "to and fro, ending on the right": draw(circle, 30 + 14 * np.sin(np.linspace(-1.5, 6, FRAMES)), STILL),
    "colour changes": draw(circle, ACROSS, STILL, lambda i: RED if i < 17 else BLUE),
    "colour changes late": draw(circle, ACROSS, STILL, lambda i: RED if i < 28 else BLUE),
    "colour fades into another": draw(circle, ACROSS, STILL, lambda i: np.array(RED) + (np.array(BLUE) - RED) * i / 32),
    "two colours in one blob": draw(square, ACROSS, STILL + 5, BLUE, onto=draw(square, ACROSS, STILL - 4), radius=7),
    "purple": draw(circle, ACROSS, STILL, (180, 30, 230)),
    "grey": draw(circle, ACROSS, STILL, (150, 150, 150)),
    "shape changes": draw(sudden, ACROSS, STILL),
    "shape changes late": draw(late, ACROSS, STILL),
    "shape changes slowly": draw(gradual, ACROSS, STILL),
    "square": draw(square, ACROSS, STILL),
    "triangle": draw(triangle, ACROSS, STILL),
    "oval": draw(lambda x, y, r: (np.hypot(x / 13, y / 7.5) - 1) * 10, ACROSS, STILL),
    "ring": draw(lambda x, y, r: abs(np.hypot(x, y) - 9) - 2.5, ACROSS, STILL),
    "half a circle": draw(lambda x, y, r: np.maximum(np.hypot(x, y) - 12, y), ACROSS, STILL),
    "two blobs that touch": draw(circle, ACROSS, STILL - 8, onto=draw(circle, ACROSS, STILL + 8, radius=9), radius=9),
    "gone at the end": draw(circle, ACROSS, STILL, lambda i: RED if i < 26 else (DARK,) * 3),
    "gone now and then": draw(circle, ACROSS, STILL, lambda i: RED if i % 5 else (DARK,) * 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_video_is_not_taken_for_right(name):
    assert judge.judge(WRONG[name]).names != RIGHT, name


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("diagonal", ("red", "circle", "none")),
        ("no motion", ("red", "circle", "none")),
        ("colour changes late", ("none", "circle", "right")),
        ("shape changes slowly", ("red", "none", "right")),
        ("two blobs", ("none", "none", "none")),
        ("an empty picture", ("none", "none", "none")),
    ],
)
def test_only_what_is_wrong_is_called_none(name, verdict):
    assert judge.judge(WRONG[name]).names == verdict


def test_smoothness_tells_an_even_path_from_a_jumping_one():
    even = judge.judge(draw(circle, ACROSS, STILL))
    jumping = judge.judge(draw(circle, ACROSS + np.random.default_rng(0).normal(0, 0.7, FRAMES), STILL))
    pulsing = judge.judge(draw(circle, ACROSS, STILL, radius=_wobbling_size))
    assert even.jerk < 0.05 < 0.5 < jumping.jerk
    assert even.size_variation < 0.01 < 0.1 < pulsing.size_variation
    assert even.names == jumping.names == RIGHT


def test_labels_come_in_many_forms():
    prompt = world.Prompt("a blue square moves up", 2, 1, 2)
    scene = world.sample_scenes(jax.random.key(0), 1)._replace(
        colour=np.array([2]), shape=np.array([1]), direction=np.array([2])
    )
    expected = [("blue", "square", "up")]
    assert judge.label_names([prompt]) == expected
    assert judge.label_names(scene) == expected
    assert judge.label_names([("blue", "square", "up")]) == expected
    assert judge.label_names(np.array([[2, 1, 2]])) == expected


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        judge.judge(np.zeros((4, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="1 videos and 2 labels"):
        judge.score([WRONG["no motion"]], [RIGHT, RIGHT])
    with pytest.raises(ValueError, match="at least one"):
        judge.score([], [])


def test_wilson_interval_has_its_textbook_values():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148.
    assert judge.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert judge.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert judge.wilson(200, 200)[1] == 1.0 and judge.wilson(200, 200)[0] == pytest.approx(0.9812, abs=1e-4)
    assert judge.wilson(0, 10)[0] == 0.0


def test_real_videos_for_a_prompt_show_what_it_says():
    prompts = world.heldout_prompts(60, seed=3)
    scenes = matching_scenes(prompts, seed=0)
    assert judge.label_names(scenes) == judge.label_names(prompts)
    small = [r for r, p in zip(scenes.radius, prompts, strict=True) if "small" in p.text.split()]
    big = [r for r, p in zip(scenes.radius, prompts, strict=True) if "big" in p.text.split()]
    assert small and big and max(small) < min(big)
