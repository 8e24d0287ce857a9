"""The VAE's decoder in pieces: what it keeps from one stretch of time to the next, and tiles of the picture.

With tiles memory does not grow with the size of the picture. The result is not exact: they overlap and are blended
linearly, as in the published code (Wan2.1 VAE tiling in LightX2V and diffusers: tiles of 256 pixels, 64 of them shared
with each neighbour).
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from x2v_jax.models.config import VaeConfig

TILE = 32  # latents: 256 pixels
OVERLAP = 8  # latents: 64 pixels


def decode_tiled(
    decode: Callable[[np.ndarray], object],
    latents: np.ndarray,
    *,
    stride: int = 8,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """Decodes tile by tile and blends the seams; on the host, float32.

    Args:
        decode: latents [B, f, th, tw, C] -> video [B, F, stride * th, stride * tw, 3]; called with one shape only.
        latents: [B, f, h, w, C].
        stride: pixels a latent.
        tile, overlap: in latents.
    """
    height, width = latents.shape[2:4]
    size_y, size_x = min(tile, height), min(tile, width)
    total: np.ndarray | None = None
    weights = np.zeros((height * stride, width * stride, 1), np.float32)
    for y, x in itertools.product(_starts(height, size_y, overlap), _starts(width, size_x, overlap)):
        piece = np.asarray(decode(latents[:, :, y : y + size_y, x : x + size_x]), np.float32)
        if total is None:
            total = np.zeros((*piece.shape[:2], height * stride, width * stride, piece.shape[-1]), np.float32)
        window_y = _ramp(size_y, y > 0, y + size_y < height, overlap, stride)
        window_x = _ramp(size_x, x > 0, x + size_x < width, overlap, stride)
        window = (window_y[:, None] * window_x[None, :])[..., None]
        rows, columns = slice(y * stride, (y + size_y) * stride), slice(x * stride, (x + size_x) * stride)
        total[:, :, rows, columns] += piece * window
        weights[rows, columns] += window
    if total is None:
        raise ValueError(f"latents of shape {latents.shape} hold nothing to decode")
    total /= weights
    return total


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Tiles of one size that cover the axis; the last is moved back to end at the border."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _ramp(tile: int, before: bool, after: bool, overlap: int, stride: int) -> np.ndarray:
    """Weight of each pixel of a tile along one axis: rising and falling where there is a neighbour, never zero."""
    window = np.ones(tile * stride, np.float32)
    if overlap == 0:
        return window
    rise = (np.arange(overlap * stride, dtype=np.float32) + 0.5) / (overlap * stride)
    if before:
        window[: overlap * stride] = rise
    if after:
        window[-overlap * stride :] = np.minimum(window[-overlap * stride :], rise[::-1])
    return window


def decoder_reach(config: VaeConfig) -> int:
    """How many latent frames before a frame have an influence on how it is decoded."""
    return math.ceil(sum(2 / rate for _, rate, _ in decoder_caches(config)))


def decoder_caches(config: VaeConfig) -> list[tuple[int, int, int]]:
    """(channels, frames a latent frame, pixels a latent's side) of each convolution in time, which keeps two frames."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    rate = scale = 1
    caches = [(config.z_dim, 1, 1)] + [(widths[0], 1, 1)] * 4
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        first = width if i == 0 else width // 2
        caches += [(first, rate, scale)] + [(out, rate, scale)] * (2 * config.num_res_blocks + 1)
        if i < len(config.dim_mult) - 1:
            if config.temporal_downsample[-1 - i]:
                caches.append((out, rate, scale))
                rate *= 2
            scale *= 2
    return [*caches, (widths[-1], rate, scale)]
