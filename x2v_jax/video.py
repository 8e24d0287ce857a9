"""The old place of `x2v_jax.media.video`, for one release."""

import warnings

from x2v_jax.media.video import (
    contact_sheet,
    encode_video,
    frame_rate,
    read_frames,
    read_metadata,
    settings_file,
    write_files,
    write_gif,
    write_png,
    write_video,
)

__all__ = [
    "contact_sheet", "encode_video", "frame_rate", "read_frames", "read_metadata", "settings_file", "write_files",
    "write_gif", "write_png", "write_video",
]  # fmt: skip

warnings.warn(
    "x2v_jax.video has moved: import write_video and read_metadata from x2v_jax, and the rest from x2v_jax.media.video",
    DeprecationWarning,
    stacklevel=2,
)
