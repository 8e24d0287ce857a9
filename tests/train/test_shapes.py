"""The Moving Shapes data set: what captions say is what the pictures show, and unseen prompts are unseen."""

import jax
import numpy as np
import pytest

from train.shapes import world
from train.shapes.world import make_tokenizer


@pytest.fixture(scope="module")
def scenes() -> world.Scene:
    return world.sample_scenes(jax.random.key(3), 200)


def test_shapes_stay_inside_the_picture(scenes: world.Scene):
    step = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[np.asarray(scenes.direction)]
    start = np.stack([scenes.start_x, scenes.start_y], -1)
    end = start + step * np.asarray(scenes.path)[:, None]
    radius = np.asarray(scenes.radius)[:, None]
    for centre in (start, end):
        assert (centre - radius >= 0).all()
        assert (centre + radius <= world.SIZE).all()


def test_the_video_moves_the_way_the_scene_says(scenes: world.Scene):
    few = world.Scene(*(field[:24] for field in scenes))
    videos = np.asarray(jax.jit(world.render)(few))
    assert videos.shape == (24, world.NUM_FRAMES, 64, 64, 3)
    assert np.abs(videos).max() <= 1.0
    chroma = videos.max(-1) - videos.min(-1)
    y, x = np.mgrid[:64, :64]
    weights = chroma.sum((2, 3))
    centre_x, centre_y = (chroma * x).sum((2, 3)) / weights, (chroma * y).sum((2, 3)) / weights
    moved = np.stack([centre_x[:, -1] - centre_x[:, 0], centre_y[:, -1] - centre_y[:, 0]], -1)
    step = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[np.asarray(few.direction)]
    np.testing.assert_allclose(moved, step * np.asarray(few.path)[:, None], atol=0.3)


@pytest.mark.slow
def test_a_clip_is_a_stretch_of_the_whole(scenes: world.Scene):
    one = world.Scene(*(field[:1] for field in scenes))
    whole = world.render(one)
    np.testing.assert_allclose(world.render(one, 5, 7), whole[:, 7:12], atol=1e-6)


def test_captions_name_what_is_there(scenes: world.Scene):
    for i, caption in enumerate(world.captions(scenes, seed=0)):
        words = caption.split()
        assert world.COLOURS[int(scenes.colour[i])] in words
        assert world.SHAPES[int(scenes.shape[i])] in words
        direction = world.DIRECTIONS[int(scenes.direction[i])]
        also = {"up": "top", "down": "bottom"}.get(direction, direction)
        assert any(word.startswith((direction, also)) for word in words)
        if "big" in words:
            assert float(scenes.radius[i]) > 11


def test_a_third_of_captions_have_the_canonical_form(scenes: world.Scene):
    texts = world.captions(scenes, seed=1)
    canonical = sum(len(t.split()) == 5 and t.split()[3] == "moves" and t.startswith("a ") for t in texts)
    assert 0.25 < canonical / len(texts) < 0.5


def test_held_out_prompts_are_never_trained_on(scenes: world.Scene):
    trained = {text for seed in range(20) for text in world.captions(scenes, seed)}
    prompts = world.heldout_prompts(200, seed=0)
    assert len({p.text for p in prompts}) == 200
    assert not trained & {p.text for p in prompts}
    counts = np.unique([(p.colour, p.shape, p.direction) for p in prompts], axis=0, return_counts=True)[1]
    assert len(counts) == 48
    assert counts.max() - counts.min() <= 1


def test_too_many_held_out_prompts_are_refused():
    with pytest.raises(ValueError, match="prompts are held out, 1000000 were asked for"):
        world.heldout_prompts(1_000_000, seed=0)


def test_the_tokenizer_knows_every_word_and_forgives_case_and_punctuation():
    tokenizer = make_tokenizer()
    for prompt in world.heldout_prompts(100, seed=2):
        assert 2 not in tokenizer.encode(prompt.text).ids
    assert tokenizer.encode("A RED circle, moves left!").ids == tokenizer.encode("a red circle moves left").ids
    assert tokenizer.encode("a purple circle").ids.count(2) == 1
    assert tokenizer.encode("").ids == [1]
