"""Reads the beginning of a video file at a given frame rate and size, a frame at a time.

The rule: frame k of the clip is what a player shows k / fps seconds after the first frame. It is scaled to cover
height x width, keeping its aspect ratio (cubic with antialiasing), and what stands over is cut off evenly.
"""

import fractions
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from x2v_jax.errors import UserError

# Time stamps are rounded to the container's clock, at the coarsest a millisecond: a frame that is due is not missed.
_TOLERANCE = fractions.Fraction(1, 500)


def read_clip(
    path: str | os.PathLike[str], *, height: int, width: int, num_frames: int, fps: float
) -> UInt8[np.ndarray, "f h w 3"]:
    """The first `num_frames` frames at `fps`, uint8 RGB [num_frames, height, width, 3].

    Raises:
        UserError: no video, a damaged one, or one that is too short.
    """
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    filled = 0
    shown: Any = None
    step = 1 / fractions.Fraction(fps).limit_denominator(100_000)
    end = fractions.Fraction(0)
    for time, duration, frame in _frames(path):
        # Everything that was due before this frame shows the one before it.
        while filled < num_frames and shown is not None and filled * step < time - _TOLERANCE:
            clip[filled] = cover(shown, height, width)
            filled += 1
        if filled == num_frames:
            return clip
        shown, end = frame, time + duration
    while filled < num_frames and shown is not None and filled * step < end - _TOLERANCE:
        clip[filled] = cover(shown, height, width)
        filled += 1
    if filled < num_frames:
        raise UserError(
            f"{os.fspath(path)} lasts {float(end):.2f} seconds, {filled} frames at {fps:g} a second, and {num_frames} "
            "are needed; leave it out (--skip-bad), or ask for fewer frames or a higher fps"
        )
    return clip


def cover(image: Any, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture scaled to cover height x width, its middle kept.

    Args:
        image: a PIL image or uint8 [H, W, 3].
    """
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if picture.size == (width, height):
        return np.asarray(picture)
    scale = min(picture.width / width, picture.height / height)
    w, h = width * scale, height * scale
    x, y = (picture.width - w) / 2, (picture.height - h) / 2
    box = (x, y, min(x + w, picture.width), min(y + h, picture.height))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def crop_to_aspect(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The largest middle part of a picture with the aspect ratio height : width, in its own pixels."""
    high, wide = image.shape[:2]
    new_high = min(high, max(1, round(wide * height / width)))
    new_wide = min(wide, max(1, round(high * width / height)))
    y, x = (high - new_high) // 2, (wide - new_wide) // 2
    return np.ascontiguousarray(image[y : y + new_high, x : x + new_wide])


def _frames(path: str | os.PathLike[str]) -> Iterator[tuple[fractions.Fraction, fractions.Fraction, np.ndarray]]:
    """(seconds since the first frame, seconds that it lasts, uint8 RGB) of each frame."""
    import av
    import av.error

    name = os.fspath(path)
    try:
        with av.open(name) as container:
            if not container.streams.video:
                raise UserError(f"{name} holds no video stream; leave it out (--skip-bad) or give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            usual = 1 / (stream.average_rate or fractions.Fraction(25))
            first = None
            for number, frame in enumerate(container.decode(stream)):
                known = frame.pts is not None and frame.time_base is not None
                time = frame.pts * frame.time_base if known else number * usual  # type: ignore[operator]
                first = time if first is None else first
                duration = frame.duration * frame.time_base if known and frame.duration else usual
                # Phones store their video lying on its side, with the rotation that sets it upright.
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield time - first, duration, np.ascontiguousarray(upright)
    except av.error.FFmpegError as error:
        raise UserError(
            f"{name} cannot be read as a video ({error.strerror}); leave it out (--skip-bad) or mend it"
        ) from error
