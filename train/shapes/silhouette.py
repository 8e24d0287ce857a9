"""Silhouettes of the Moving Shapes judge: is a blob a circle, a square or a triangle?

A blob is moved to its centroid and scaled to area one, then compared with blurred templates of the three shapes, also
of area one about their centroids. Blur changes neither area nor centroid, so a soft square stays nearer to a soft
square than to a circle; ratios such as area over bounding box do not survive the blur of an autoencoder.
"""

import functools

import numpy as np

SHAPES = ("circle", "square", "triangle")

_GRID = 32  # samples along each axis, over +-_HALF_WIDTH times the square root of the area
_HALF_WIDTH = 1.05
_BLURS = (0.02, 0.06, 0.1, 0.14, 0.18, 0.23)  # in square roots of the area; 0.06 is about one pixel


def silhouettes(cover: np.ndarray, centre: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Each frame's blob moved to its centroid and scaled to area one, bilinearly.

    Args:
        cover: share of each pixel that the blob covers, [F, H, W] in 0..1.
        centre: centroids x, y in pixels, [F, 2].
        area: sums of `cover`, [F].

    Returns:
        [F, 32, 32].
    """
    pad = 2
    padded = np.pad(cover, ((0, 0), (pad, pad), (pad, pad)))
    offsets = np.sqrt(area)[:, None] * _grid()
    x = np.clip(centre[:, :1] + offsets + pad, 0, padded.shape[2] - 1.001)[:, None, :]
    y = np.clip(centre[:, 1:] + offsets + pad, 0, padded.shape[1] - 1.001)[:, :, None]
    x0, y0 = x.astype(int), y.astype(int)
    fx, fy = x - x0, y - y0
    f = np.arange(len(cover))[:, None, None]
    top = padded[f, y0, x0] * (1 - fx) + padded[f, y0, x0 + 1] * fx
    bottom = padded[f, y0 + 1, x0] * (1 - fx) + padded[f, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _grid() -> np.ndarray:
    return (np.arange(_GRID) + 0.5) * (2 * _HALF_WIDTH / _GRID) - _HALF_WIDTH


@functools.cache
def _templates() -> np.ndarray:
    """Circle, square and triangle of area one about their centroids, at each blur: [3, len(_BLURS), 32, 32]."""
    fine = 4
    step = 2 * _HALF_WIDTH / (_GRID * fine)
    axis = (np.arange(3 * _GRID * fine) + 0.5) * step - 3 * _HALF_WIDTH  # wide, so that blur does not lose area
    x, y = np.meshgrid(axis, axis)
    height = np.sqrt(2.0)  # the triangle stands in a square box: area = height squared / 2, centroid at 2/3
    outlines = (
        np.hypot(x, y) <= np.sqrt(1 / np.pi),
        np.maximum(np.abs(x), np.abs(y)) <= 0.5,
        (2 * np.abs(x) <= y + height * 2 / 3) & (y <= height / 3),
    )
    frequency = np.fft.fftfreq(len(axis), step)
    squared = frequency[:, None] ** 2 + frequency[None] ** 2
    inner = slice(_GRID, 2 * _GRID)
    templates = np.zeros((len(SHAPES), len(_BLURS), _GRID, _GRID))
    for i, outline in enumerate(outlines):
        spectrum = np.fft.fft2(outline.astype(float))
        for j, blur in enumerate(_BLURS):
            soft = np.real(np.fft.ifft2(spectrum * np.exp(-2 * np.pi**2 * blur**2 * squared)))
            coarse = soft.reshape(3 * _GRID, fine, 3 * _GRID, fine).mean((1, 3))
            templates[i, j] = coarse[inner, inner]
    return templates


def misfits(silhouette: np.ndarray) -> np.ndarray:
    """Squared distance of a silhouette [32, 32] from each shape at its best blur, over its own square: [3]."""
    distance = ((_templates() - silhouette) ** 2).sum((2, 3)).min(1)
    return distance / (silhouette**2).sum()
