"""Contact sheets of videos."""

import pathlib

import numpy as np
from PIL import Image

from x2v_jax.media.pixels import to_uint8


def save_grid(path: pathlib.Path, videos: np.ndarray, every: int = 4) -> None:
    """One row a video, every 4th frame a column. videos: [N, F, H, W, 3] in [-1, 1]."""
    frames = to_uint8(np.asarray(videos))[:, ::every]
    n, f, h, w, c = frames.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frames.transpose(0, 2, 1, 3, 4).reshape(n * h, f * w, c)).save(path)
