"""Judges videos of the Moving Shapes world by image analysis: which colour, which shape, which way, how smoothly.

Pure numpy, and blind to how the videos were made: nothing here is shared with the renderer or with a network, so that
the same measure serves real data, autoencoder reconstructions, teachers and students.

How it looks. Backgrounds are grey, so chroma (max - min of RGB) is proportional to how much of a pixel the shape
covers. From chroma come a soft mask, its largest connected piece and the centroid of every frame. The colour is a vote
of pixels by hue. For the shape, the piece is shifted to its centroid, scaled to area one and averaged over a quarter of
the video, and that silhouette is compared with blurred circles, squares and triangles of the same area; blur keeps
area and centroid, so a soft square is still nearer to a soft square than to a circle. The direction is read from the
path of the centroid. Whatever is doubtful (two pieces, a colour or shape that changes, a diagonal path) is "none" and
counts as wrong.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .silhouette import SHAPES, misfits, silhouettes

COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = ("left", "right", "up", "down")
NONE = "none"

_HUES = np.array([0.0, 125.0, 231.0, 53.0])  # degrees, in the order of COLOURS
_HUE_TOLERANCE = 30.0
_MIN_CHROMA = 0.25  # of 1; the palest colour of the world has 0.62
_MIN_AREA, _MAX_AREA = 80.0, 1100.0  # pixels; the world's shapes have 162 to 452
_MAX_STRAY = 0.12  # share of the coloured area that may lie outside the largest piece
_MIN_FRAMES = 0.9  # share of frames that must hold one blob, and that must agree on its colour
_MIN_COLOUR_SHARE = 0.75  # share of a frame's core pixels that must have one hue
_MAX_MISFIT = 0.06  # of the silhouette's energy; beyond it the blob is none of the three shapes
_MORPH_RATIO = 1.3  # a quarter of the video that fits another shape this much better contradicts the whole
_MIN_TRAVEL = 8.0  # pixels between the ends of the path; the world's shapes travel 24 to 38
_MAX_SIDEWAYS = 0.5  # of the travel
_MIN_EFFICIENCY = 0.7  # travel over length of the (smoothed) path along it: one way, not to and fro
_SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class Track:
    """One video measured frame by frame; arrays over F frames.

    found: [F] bool, the frame holds exactly one coloured blob.
    centre: [F, 2] centroid x, y in pixels, y downwards, and area: [F] in pixels, both sub-pixel; NaN where not found.
    colour: [F] index into COLOURS or -1; hue: [F, 2] mean hue as a point in the unit circle.
    chroma: [F] of the blob's core, 0 to 1.
    cover: [F, H, W] share of each pixel that the blob covers; piece: [F, H, W] bool, where the blob may lie.
    """

    found: np.ndarray
    centre: np.ndarray
    area: np.ndarray
    colour: np.ndarray
    hue: np.ndarray
    chroma: np.ndarray
    cover: np.ndarray
    piece: np.ndarray


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a video shows. `colour`, `shape` and `direction` are names, or "none" where the video gives no clear answer.

    found: one blob was there in nearly every frame.
    misfit: distance of the silhouette from the nearest of the three shapes, 0 to about 1.
    jerk: root mean square of the second differences of the centroid, in pixels a frame squared (0 is a straight path
    at constant speed; NaN when the blob is not found). size_variation: standard deviation over mean of the area.
    """

    colour: str
    shape: str
    direction: str
    found: bool
    misfit: float
    jerk: float
    size_variation: float

    @property
    def names(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.direction


def track(video: np.ndarray) -> Track:
    """Finds the blob in every frame of a uint8 video [F, H, W, 3]."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"a video is uint8 [frames, height, width, 3], not {video.dtype} {list(video.shape)}")
    rgb = video.astype(np.float32) / 255.0
    red, green, blue = np.moveaxis(rgb, -1, 0)
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    peak = np.quantile(chroma, 0.98, axis=(1, 2))
    visible = peak >= _MIN_CHROMA
    mask = (chroma > 0.5 * peak[:, None, None]) & visible[:, None, None]
    main = _largest_piece(mask)
    # Core pixels know the full chroma, the rest of the picture knows how much chroma "nothing" has.
    piece = _dilate(_dilate(main))
    floor = _masked_median(chroma, ~_dilate(_dilate(mask)))
    core_chroma = _masked_median(chroma, main & (chroma > 0.8 * peak[:, None, None]))
    span = np.maximum(core_chroma - floor, 1e-3)[:, None, None]
    cover = np.where(piece, np.clip((chroma - floor[:, None, None]) / span, 0.0, 1.0), 0.0)
    area = cover.sum((1, 2))
    pixels = mask.sum((1, 2))
    stray = 1.0 - main.sum((1, 2)) / np.maximum(pixels, 1)
    found = visible & (stray <= _MAX_STRAY) & (area >= _MIN_AREA) & (area <= _MAX_AREA)
    colour, hue = _frame_colours(rgb, main & (cover > 0.7))
    y, x = np.mgrid[: video.shape[1], : video.shape[2]].astype(np.float32)
    weight = np.maximum(area, 1e-6)
    centre = np.stack([(cover * x).sum((1, 2)) / weight, (cover * y).sum((1, 2)) / weight], -1)
    return Track(
        found=found,
        centre=np.where(found[:, None], centre, np.nan),
        area=np.where(found, area, np.nan),
        colour=np.where(found, colour, -1),
        hue=hue,
        chroma=core_chroma,
        cover=cover,
        piece=piece,
    )


def judge(video: np.ndarray) -> Verdict:
    """Says what a uint8 video [F, H, W, 3] shows."""
    return verdict(track(video))


def verdict(seen: Track) -> Verdict:
    """Says what a tracked video shows."""
    found = bool(seen.found.mean() >= _MIN_FRAMES)
    shape, misfit = _shape(seen) if found else (NONE, 1.0)
    jerk, size_variation = _smoothness(seen) if found else (np.nan, np.nan)
    return Verdict(
        colour=_colour(seen) if found else NONE,
        shape=shape,
        direction=_direction(seen) if found else NONE,
        found=found,
        misfit=misfit,
        jerk=jerk,
        size_variation=size_variation,
    )


def score(videos: Iterable[np.ndarray], labels: Any) -> dict[str, float]:
    """Scores videos uint8 [N, F, H, W, 3] (or any iterable of them) against what they should show.

    Args:
        videos: the videos.
        labels: for each, (colour, shape, direction) as names or as indices into COLOURS, SHAPES, DIRECTIONS; objects
            with those attributes; or one object whose attributes are arrays (a batch of scenes).

    Returns:
        The means described at `summarize`.
    """
    return summarize([judge(video) for video in videos], labels)


def summarize(verdicts: Sequence[Verdict], labels: Any) -> dict[str, float]:
    """Means over videos: `colour`, `shape`, `direction`, `all` (three right), `all_low`, `all_high` (95 % Wilson
    interval of `all`), `found` (shares of n); `jerk` and `size_variation` (medians over the videos with a blob).
    """
    wanted = label_names(labels)
    if len(wanted) != len(verdicts) or not verdicts:
        raise ValueError(f"{len(verdicts)} videos and {len(wanted)} labels: give at least one, and as many of each")
    right = np.array([[a == b for a, b in zip(v.names, w, strict=True)] for v, w in zip(verdicts, wanted, strict=True)])
    hits = int(right.all(1).sum())
    low, high = wilson(hits, len(verdicts))
    seen = [v for v in verdicts if v.found]
    return {
        "n": len(verdicts),
        "colour": float(right[:, 0].mean()),
        "shape": float(right[:, 1].mean()),
        "direction": float(right[:, 2].mean()),
        "all": hits / len(verdicts),
        "all_low": low,
        "all_high": high,
        "found": len(seen) / len(verdicts),
        "jerk": float(np.median([v.jerk for v in seen])) if seen else float("nan"),
        "size_variation": float(np.median([v.size_variation for v in seen])) if seen else float("nan"),
    }


def label_names(labels: Any) -> list[tuple[str, str, str]]:
    """Reads labels in any of the forms that `score` takes into (colour, shape, direction) names."""
    if hasattr(labels, "colour"):
        labels = list(zip(*(np.asarray(getattr(labels, f)) for f in ("colour", "shape", "direction")), strict=True))
    names = []
    for label in labels:
        parts = (label.colour, label.shape, label.direction) if hasattr(label, "colour") else label
        c, s, d = (_name(part, words) for part, words in zip(parts, (COLOURS, SHAPES, DIRECTIONS), strict=True))
        names.append((c, s, d))
    return names


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (95 % by default): unlike the normal one it stays inside [0, 1] and is not empty at
    0 or n hits. E. B. Wilson, 1927.
    """
    share, z2 = hits / n, z * z / n
    middle = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * np.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _name(part: Any, words: tuple[str, ...]) -> str:
    return part if isinstance(part, str) else words[int(part)]


# --- frames: one coloured piece, its hue ---


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Grows [F, H, W] by one pixel in the eight directions."""
    wide = mask.copy()
    wide[:, :, 1:] |= mask[:, :, :-1]
    wide[:, :, :-1] |= mask[:, :, 1:]
    tall = wide.copy()
    tall[:, 1:] |= wide[:, :-1]
    tall[:, :-1] |= wide[:, 1:]
    return tall


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """The connected piece of each frame's mask [F, H, W] around its densest spot, by growing from there."""
    frames, height, width = mask.shape
    density = mask.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(density, [(5, 4) if a == axis else (0, 0) for a in range(3)])
        sums = padded.cumsum(axis)
        density = np.take(sums, range(9, sums.shape[axis]), axis) - np.take(sums, range(sums.shape[axis] - 9), axis)
    spot = np.where(mask, density, -1.0).reshape(frames, -1).argmax(1)
    piece = np.zeros((frames, height * width), bool)
    piece[np.arange(frames), spot] = True
    piece = piece.reshape(mask.shape) & mask
    while True:
        grown = _dilate(piece) & mask
        if (grown == piece).all():
            return piece
        piece = grown


def _masked_median(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Median of each frame's masked pixels, 0 where there are none: [F, H, W] -> [F]."""
    return np.array([np.median(v[m]) if m.any() else 0.0 for v, m in zip(values, mask, strict=True)], np.float32)


def _frame_colours(rgb: np.ndarray, core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour that most core pixels of each frame have, -1 where they are of several or of none: [F].

    Also their mean hue as a vector of length at most one: [F, 2].
    """
    frames = len(rgb)
    frame = np.nonzero(core)[0]
    red, green, blue = rgb[core].T
    angle = np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue)
    away = np.abs((np.degrees(angle)[:, None] - _HUES + 180.0) % 360.0 - 180.0)
    nearest = np.where(away.min(1) <= _HUE_TOLERANCE, away.argmin(1), -1)
    votes = np.stack([np.bincount(frame, nearest == i, frames) for i in range(len(COLOURS))], -1)
    pixels = np.maximum(np.bincount(frame, minlength=frames), 1)
    hue = np.stack([np.bincount(frame, part, frames) / pixels for part in (np.cos(angle), np.sin(angle))], -1)
    return np.where(votes.max(-1) >= _MIN_COLOUR_SHARE * pixels, votes.argmax(-1), -1), hue


# --- videos: colour, shape, direction, smoothness ---


def _colour(seen: Track) -> str:
    votes = np.bincount(seen.colour[seen.colour >= 0], minlength=len(COLOURS))
    return COLOURS[int(votes.argmax())] if votes.max() >= _MIN_FRAMES * len(seen.found) else NONE


def _shape(seen: Track) -> tuple[str, float]:
    frames = np.flatnonzero(seen.found)
    shots = silhouettes(seen.cover[frames], seen.centre[frames], seen.area[frames])
    whole = misfits(shots.mean(0))
    best = int(whole.argmin())
    misfit = float(whole[best])
    if misfit > _MAX_MISFIT:
        return NONE, misfit
    for part in np.array_split(shots, _SEGMENTS):
        parts = misfits(part.mean(0))
        if parts[best] > min(_MORPH_RATIO * parts.min(), 2 * _MAX_MISFIT):
            return NONE, misfit
    return SHAPES[best], misfit


def _direction(seen: Track) -> str:
    path = seen.centre[seen.found]
    ends = max(1, len(path) // 5)
    travel = path[-ends:].mean(0) - path[:ends].mean(0)
    major = int(np.abs(travel).argmax())
    length = abs(travel[major])
    if length < _MIN_TRAVEL or abs(travel[1 - major]) > _MAX_SIDEWAYS * length:
        return NONE
    window = min(5, len(path))
    smoothed = np.convolve(path[:, major], np.ones(window) / window, mode="valid")
    walked = np.abs(np.diff(smoothed)).sum()
    if walked > 0 and abs(smoothed[-1] - smoothed[0]) < _MIN_EFFICIENCY * walked:
        return NONE
    names = (("left", "right"), ("up", "down"))
    return names[major][int(travel[major] > 0)]


def _smoothness(seen: Track) -> tuple[float, float]:
    """jerk and size_variation; second differences only where three neighbouring frames hold the blob."""
    bends = np.diff(seen.centre, 2, axis=0)
    jerk = float(np.sqrt(np.nanmean((bends**2).sum(-1)))) if np.isfinite(bends).any() else float("nan")
    area = seen.area[seen.found]
    return jerk, float(area.std() / area.mean())
