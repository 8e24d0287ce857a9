"""Contact sheets of videos."""

import pathlib

import einops
import numpy as np

from x2v_jax.media.pixels import to_uint8
from x2v_jax.media.video import write_png


def save_grid(path: pathlib.Path, videos: np.ndarray, every: int = 4) -> None:
    """One row a video, every 4th frame a column. videos: [N, F, H, W, 3] in [-1, 1]."""
    frames = to_uint8(np.asarray(videos))[:, ::every]
    write_png(path, einops.rearrange(frames, "n f h w c -> (n h) (f w) c"))
