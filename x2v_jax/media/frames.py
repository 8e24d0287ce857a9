"""The frames of a video file, one at a time."""

import errno
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8


class NoVideoStream(Exception):
    """A file that FFmpeg can read and that holds sound or subtitles alone."""


def decoded_frames(path: str | os.PathLike[str]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Decodes the first video stream as RGB; one frame lies in memory at a time. Frames are not turned upright.

    Raises:
        OSError: the file cannot be opened or decoded; `strerror` says why.
        NoVideoStream: it holds no video.
    """
    import av.error
    import imageio.v3 as iio

    with open(path, "rb") as file:  # imageio would take a path that looks like a URL for one
        try:
            video = iio.imopen(file, "r", plugin="pyav")  # pyright: ignore[reportUnknownMemberType]
        except OSError as error:
            raise _reason(error) from error
        with video:
            try:
                yield from video.iter(format="rgb24")  # pyright: ignore[reportUnknownMemberType]
            except av.error.FFmpegError as error:
                raise OSError(error.errno, error.strerror) from error
            except AttributeError as error:  # imageio asks a decoder that is not there for its settings
                raise OSError(errno.EINVAL, "Decoder not found") from error


def _reason(error: OSError) -> Exception:
    """What stands behind imageio's general sentence: FFmpeg's own error, or that there is no stream to take."""
    import av.error

    cause = error.__cause__
    if isinstance(cause, IndexError):
        return NoVideoStream()
    reason = cause.__context__ if cause else None
    if isinstance(reason, av.error.FFmpegError):
        return OSError(reason.errno, reason.strerror)
    # An empty file: FFmpeg seeks to before its beginning, and it is Python that complains.
    return OSError(errno.EINVAL, "Invalid data found when processing input")
