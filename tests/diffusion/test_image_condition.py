"""Image-to-video's condition: sizes, torch's bicubic numbers, CLIP's input, mask and latents."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion.image_condition import (
    clip_pixels,
    condition_mask,
    image_condition,
    latent_size,
    pin_first_frame,
    resize_bicubic,
)
from x2v_jax.errors import UserError


def _picture(height: int, width: int) -> np.ndarray:
    y, x, c = np.indices((height, width, 3))
    return ((3 * y * y + 17 * x + x * y + 50 * c) % 256).astype(np.uint8)


# (height, width) -> latent (height, width), as the published expression gives them.
_AT_480P = {
    (480, 832): (58, 104),
    (832, 480): (104, 60),
    (720, 1280): (58, 104),
    (512, 512): (78, 78),
    (600, 800): (68, 90),
    (418, 640): (62, 96),
}
_AT_720P = {
    (720, 1280): (90, 160),
    (480, 832): (90, 156),
    (512, 512): (120, 120),
    (418, 640): (96, 148),
    (100, 1000): (36, 378),
}


@pytest.mark.parametrize(("size", "expected"), _AT_480P.items())
def test_latent_sizes_at_480p(size, expected):
    assert latent_size(*size, 480 * 832) == expected


@pytest.mark.parametrize(("size", "expected"), _AT_720P.items())
def test_latent_sizes_at_720p(size, expected):
    assert latent_size(*size, 720 * 1280) == expected


def test_latent_sizes_follow_the_stride_and_patch_and_stay_within_the_area():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(n) for n in rng.integers(50, 4000, 2))
        lat_h, lat_w = latent_size(height, width, 480 * 832)
        assert lat_h % 2 == 0 and lat_w % 2 == 0 and isinstance(lat_h, int)
        assert 8 * lat_h * 8 * lat_w <= 480 * 832
        assert latent_size(height * 3, width * 3, 480 * 832) == (lat_h, lat_w)
    assert latent_size(64, 64, 64 * 64, spatial_stride=4, patch_size=(1, 1, 1)) == (16, 16)
    assert latent_size(64, 64, 64 * 64, spatial_stride=16, patch_size=(1, 4, 2)) == (4, 4)


@pytest.mark.parametrize(("height", "width"), [(10, 20_000), (20_000, 10), (1, 100_000), (37, 90_001)])
@pytest.mark.parametrize("area", [64 * 64, 480 * 832, 720 * 1280])
def test_a_very_long_picture_is_refused_with_the_nearest_that_works(height, width, area):
    with pytest.raises(UserError, match=rf"image is {width}x{height} pixels.*crop it to at most") as caught:
        latent_size(height, width, area)
    near_w, near_h = (int(n) for n in str(caught.value).split("at most ")[1].split(" ")[0].split("x"))
    assert min(latent_size(near_h, near_w, area)) >= 2
    longer = (near_h, near_w + 1) if width > height else (near_h + 1, near_w)
    with pytest.raises(UserError):
        latent_size(*longer, area)


def test_a_video_longer_than_the_rotary_tables_is_refused():
    assert latent_size(100, 6000, 480 * 832) == (10, 610)
    with pytest.raises(UserError, match="crop it"):
        latent_size(100, 6000, 16_000 * 1000)


@pytest.mark.parametrize("area", [100, 10**10])
def test_an_area_that_no_picture_fits_is_refused(area):
    with pytest.raises(UserError, match=rf"height x width is {area} pixels.*between 16x16 and 16384x16384"):
        latent_size(480, 832, area)


# The green channel of torch 2.13's interpolate(mode="bicubic", align_corners=False) of _picture / 127.5 - 1.
_TORCH = {
    (5, 7): [
        [-0.5175385475158691, -0.1813725382089615, 0.1547936201095581],
        [-0.254808247089386, 0.1320466250181198, 0.5189015269279480],
    ],
    (3, 2): [
        [-0.6241701245307922, -0.5986449718475342, -0.5431468486785889, -0.4876486659049988, -0.4621237814426422],
        [-0.6157058477401733, -0.5892736315727234, -0.5318033695220947, -0.4743330478668213, -0.4479011297225952],
        [-0.5722635388374329, -0.5444133281707764, -0.4838598668575287, -0.4233064055442810, -0.3954564929008484],
        [-0.5251504182815552, -0.4963932037353516, -0.4338676035404205, -0.3713419139385223, -0.3425848782062531],
    ],
    (41, 60): [
        [0.44270122051239014, 0.6512712240219116],
        [-0.03921567648649216, -0.3686274588108063],
        [0.5019598603248596, 0.2318083941936493],
    ],
}


@pytest.mark.parametrize("size", _TORCH)
def test_bicubic_equals_torch(size):
    expected = np.array(_TORCH[size], np.float32)
    result = resize_bicubic(_picture(*size), *expected.shape)
    np.testing.assert_allclose(result[..., 1], expected, atol=1e-6)
    assert result.dtype == np.float32


def test_bicubic_equals_torch_at_full_size_and_keeps_its_overshoot():
    result = resize_bicubic(_picture(300, 500), 464, 704)
    np.testing.assert_allclose(result[200, 300], [0.02830588258, 0.30434679985, 0.83077651262], atol=3e-6)
    np.testing.assert_allclose([result.min(), result.max()], [-1.3509337, 1.4839673], atol=3e-6)
    assert abs(result.astype(np.float64).mean() - 0.001200903142) < 1e-7


def test_bicubic_of_the_same_size_changes_nothing():
    picture = _picture(9, 13)
    np.testing.assert_allclose(resize_bicubic(picture, 9, 13), picture / 127.5 - 1, atol=1e-6)


def test_bicubic_keeps_plain_colours_and_works_on_one_pixel():
    plain = np.full((1, 1, 3), (0, 128, 255), np.uint8)
    for height, width in [(1, 1), (5, 3), (16, 32)]:
        result = resize_bicubic(plain, height, width)
        np.testing.assert_allclose(result, np.broadcast_to([-1, 128 / 127.5 - 1, 1], result.shape), atol=1e-6)


def test_clip_pixels_equal_the_published_preprocessing():
    # torch: interpolate to 224 x 224, * 0.5 + 0.5, torchvision's Normalize.
    pixels = clip_pixels(_picture(300, 500))
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.float32
    expected = {
        (0, 0): [-1.6580537557601929, -0.8637369871139526, 0.07251686602830887],
        (0, 223): [-1.4915717840194702, -0.6311267614364624, 0.292917937040329],
        (100, 37): [-0.0620735399425030, -0.0899234265089035, 1.1501863002777100],
        (223, 223): [0.0986412689089775, 0.9422164559364319, 0.4359714388847351],
    }
    for place, value in expected.items():
        np.testing.assert_allclose(pixels[place], value, atol=1e-5)


def test_clip_pixels_of_another_size():
    assert clip_pixels(_picture(20, 30), 56).shape == (56, 56, 3)


def test_the_mask_marks_the_first_latent_frame():
    mask = condition_mask(3, 4, 6)
    assert mask.shape == (3, 4, 6, 4)
    assert (mask[0] == 1).all() and (mask[1:] == 0).all()


def test_the_mask_is_the_published_one_of_pixel_frames():
    # One for the given frame, repeated over its latent frame; zeros for the 4n others; four to a latent frame.
    frames, height, width = 9, 2, 3
    flags = np.zeros((frames, height, width))
    flags[0] = 1
    flags = np.concatenate([np.repeat(flags[:1], 4, axis=0), flags[1:]])
    published = flags.reshape(-1, 4, height, width).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(condition_mask(3, height, width), published)


def _latents(frames: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (frames, 4, 2, 16))


def test_the_condition_is_mask_then_latents():
    latents = _latents(3)
    condition = image_condition(latents)
    assert condition.shape == (3, 4, 2, 20) and condition.dtype == jnp.float32
    np.testing.assert_array_equal(condition[..., :4], condition_mask(3, 4, 2))
    np.testing.assert_array_equal(condition[..., 4:], latents)
    batch = image_condition(jnp.stack([latents, -latents]).astype(jnp.bfloat16))
    assert batch.shape == (2, 3, 4, 2, 20) and batch.dtype == jnp.float32
    np.testing.assert_array_equal(batch[1, ..., :4], condition[..., :4])


def test_the_condition_of_a_single_frame():
    assert image_condition(_latents(1), temporal_stride=2).shape == (1, 4, 2, 18)


def test_pinning_replaces_the_first_latent_frame_and_no_other():
    latents = jax.random.normal(jax.random.key(0), (3, 4, 2, 16))
    condition = image_condition(_latents(3))
    pinned = pin_first_frame(latents, condition)
    np.testing.assert_array_equal(pinned[0], condition[0, ..., 4:])
    np.testing.assert_array_equal(pinned[1:], latents[1:])


def test_pinning_keeps_dtype_and_takes_batches():
    latents = jnp.ones((2, 3, 2, 2, 16), jnp.bfloat16)
    condition = jnp.zeros((2, 3, 2, 2, 20)).at[1].set(5)
    pinned = jax.jit(pin_first_frame)(latents, condition)
    assert pinned.dtype == jnp.bfloat16
    assert (pinned[0, 0] == 0).all() and (pinned[1, 0] == 5).all() and (pinned[:, 1:] == 1).all()


def test_sizes_and_pixels_do_not_load_jax():
    code = (
        "import sys, numpy as np; from x2v_jax.diffusion import image_condition as c;"
        "c.latent_size(480, 832, 480 * 832); c.clip_pixels(np.zeros((4, 4, 3), np.uint8)); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
