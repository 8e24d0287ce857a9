"""What image-to-video conditions on: the size that the picture asks for, CLIP's input, and the mask and latents of the
first frame.

Source: LightX2V models/runners/wan/wan_runner.py (run_image_encoder, run_vae_encoder), itself after Wan2.1
wan/image2video.py. Sizes and pixels are numpy, so that a request is checked without loading jax.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from x2v_jax.errors import UserError

Image = UInt8[np.ndarray, "_ _ 3"]
# A jax array, whose type cannot be named without loading jax.
Latents = Float[Any, "*b f h w c"]
# A mask and latents side by side: d channels are temporal stride + c.
Condition = Float[Any, "*b f h w d"]

# The rotary tables of the published networks hold so many positions an axis.
_MAX_PATCHES = 1024
# OpenAI CLIP's training statistics, of RGB in [0, 1].
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# Cubic convolution's free parameter: torch uses -0.75 where Pillow uses -0.5.
_CUBIC_A = np.float32(-0.75)


def latent_size(
    height: int,
    width: int,
    max_area: int,
    *,
    spatial_stride: int = 8,
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> tuple[int, int]:
    """Height and width in latent pixels of the video made from a picture: its aspect ratio at about `max_area` pixels.

    The floor divisions act on floats, so 480 x 832 at its own area gives 58 x 104, not 60 x 104, while 832 x 480 gives
    104 x 60. The published models are run that way, so it is kept.

    Args:
        height, width: of the picture, in pixels.
        max_area: height times width asked of the video, in pixels.
        spatial_stride: pixels a latent pixel, of the VAE.
        patch_size: frames, height and width of a token in latent pixels, of the transformer.

    Returns:
        (latent height, latent width), multiples of the patch; times `spatial_stride` they are the video's size.

    Raises:
        UserError: the picture is so long that one side would vanish, or not fit the network's positions.
    """
    size = _size(height, width, max_area, spatial_stride, patch_size)
    if _fits(size, patch_size):
        return size
    if not _fits(_size(1, 1, max_area, spatial_stride, patch_size), patch_size):
        low, high = spatial_stride * max(patch_size[1:]), spatial_stride * _MAX_PATCHES * min(patch_size[1:])
        raise UserError(
            f"height x width is {max_area} pixels, which this model cannot make; "
            f"ask for an area between {low}x{low} and {high}x{high}"
        )
    short, long = min(height, width), max(height, width)

    def acceptable(long_side: int) -> bool:
        sides = (short, long_side) if width >= height else (long_side, short)
        return _fits(_size(*sides, max_area, spatial_stride, patch_size), patch_size)

    # Square pictures are acceptable and this one is not: the border lies in between.
    low, high = short, long
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if acceptable(middle) else (low, middle)
    nearest = (low, short) if width >= height else (short, low)
    raise UserError(
        f"image is {width}x{height} pixels (width x height), too long for a video of about {max_area} pixels; "
        f"crop it to at most {nearest[0]}x{nearest[1]} or ask for a larger height and width"
    )


def _size(height: int, width: int, max_area: int, stride: int, patch_size: tuple[int, int, int]) -> tuple[int, int]:
    ratio = height / width
    _, patch_h, patch_w = patch_size
    # Written as the source has it: another order of these operations rounds otherwise.
    lat_h = round(np.sqrt(max_area * ratio) // stride // patch_h * patch_h)
    lat_w = round(np.sqrt(max_area / ratio) // stride // patch_w * patch_w)
    return lat_h, lat_w


def _fits(size: tuple[int, int], patch_size: tuple[int, int, int]) -> bool:
    return all(1 <= side // patch <= _MAX_PATCHES for side, patch in zip(size, patch_size[1:], strict=True))


def resize_bicubic(image: Image, height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Resizes to exactly height x width pixels, without cropping, by cubic convolution with a = -0.75.

    Equals torch's `interpolate(mode="bicubic", align_corners=False, antialias=False)`: borders are replicated, values
    overshoot and are not clamped, and shrinking skips pixels instead of averaging them. The models are run that way.

    Args:
        image: uint8 RGB.
        height, width: of the result, in pixels.

    Returns:
        float32 [height, width, 3], 0..255 taken to [-1, 1].
    """
    values = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    rows, row_weights = _cubic_taps(image.shape[0], height)
    columns, column_weights = _cubic_taps(image.shape[1], width)
    result = np.zeros((height, width, 3), np.float32)
    # Sixteen gathers of the result's size: memory does not depend on the picture's.
    for i in range(4):
        row = np.zeros_like(result)
        for j in range(4):
            row += values[image[np.ix_(rows[:, i], columns[:, j])]] * column_weights[None, :, j, None]
        result += row * row_weights[:, None, i, None]
    return result


def _cubic_taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The four source pixels of each new pixel and their float32 weights, both [new_size, 4] (Keys, 1981)."""
    scale = np.float32(size) / np.float32(new_size)
    # One rounding, as in the fused multiply-add that torch compiles to.
    position = (np.float64(scale) * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    a, one, two = _CUBIC_A, np.float32(1), np.float32(2)

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((a + two) * x - (a + np.float32(3))) * x * x + one

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return ((a * x - np.float32(5) * a) * x + np.float32(8) * a) * x - np.float32(4) * a

    weights = np.stack([far(t + one), near(t), near(one - t), far(two - t)], axis=1)
    taps = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(taps, 0, size - 1), weights


def clip_pixels(image: Image, size: int = 224) -> Float[np.ndarray, "s s 3"]:
    """The picture as CLIP's visual tower takes it: squeezed to a square, without cropping, and normalised.

    Args:
        image: uint8 RGB.
        size: of the square, in pixels (ClipConfig.image_size).

    Returns:
        float32 [size, size, 3].
    """
    pixels = resize_bicubic(image, size, size) * np.float32(0.5) + np.float32(0.5)
    return (pixels - _CLIP_MEAN) / _CLIP_STD


def condition_mask(
    latent_frames: int, latent_height: int, latent_width: int, channels: int = 4
) -> Float[np.ndarray, "f h w c"]:
    """1 on the latent frame that is given, 0 on those to be made. float32 [F, h, w, channels].

    The channels stand for the `channels` pixel frames (the VAE's temporal stride) of a latent frame; the first latent
    frame holds one pixel frame, which is repeated, so all its channels are 1.
    """
    mask = np.zeros((latent_frames, latent_height, latent_width, channels), np.float32)
    mask[0] = 1
    return mask


def image_condition(latents: Float[Any, "*b f h w c"], temporal_stride: int = 4) -> Condition:
    """Mask and latents of the picture, which the transformer takes beside the noisy latents on every step.

    Args:
        latents: normalised latents of the video that is the picture (`resize_bicubic` to the video's size; overshoot is
            kept) and then grey (zero) frames.
        temporal_stride: pixel frames a latent frame, of the VAE.

    Returns:
        float32 [..., f, h, w, temporal_stride + C] (4 + 16 for Wan2.1): the mask, then the latents.
    """
    import jax.numpy as jnp

    mask = condition_mask(*latents.shape[-4:-1], channels=temporal_stride)
    mask = jnp.broadcast_to(mask, (*latents.shape[:-1], temporal_stride))
    return jnp.concatenate([mask, latents.astype(jnp.float32)], axis=-1)


def pin_first_frame(latents: Latents, condition: Float[Any, "*b f h w d"]) -> Latents:
    """Replaces the first latent frame by the encoded picture, so that the video starts with the picture itself.

    The published pipelines do not: the mask tells the network to keep the first frame, and it does so up to a slight
    shift of colour and detail. Pinned, the first frame is what the VAE makes of the picture, exactly; the price is that
    the shift then shows between the first frame and the second. So it is for those who ask (say, to join a video to
    the still that it starts from), after the last step only: on earlier steps it would change what was trained.

    Args:
        latents: after sampling.
        condition: of `image_condition`, whose last C channels are the picture's latents.

    Returns:
        the latents, in their own dtype, with frame 0 replaced.
    """
    first = condition[..., 0, :, :, -latents.shape[-1] :]
    return latents.at[..., 0, :, :, :].set(first.astype(latents.dtype))
