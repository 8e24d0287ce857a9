"""How far one set of Moving Shapes videos is from another: a Fréchet distance over features that one can name.

Networks trained on photographs say little about flat shapes, so the features are measured by the judge's own tracker:
what the video shows and how cleanly. Each is counted in a fixed unit (about its spread in real data, or the least
difference that an eye notices where real data has no spread), not by the spread of either set: distances stay
comparable from run to run, and perfect smoothness of the real set does not blow tiny jitters up.

Two sets of real videos are not 0 apart either: with d features, each set of n adds up to about d^2 / 4n. Quote that
floor, measured, beside a distance, and compare only sets of one size.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from train.shapes.judge import Track, track
from train.shapes.silhouette import misfits, silhouettes

# name -> (centre, unit). Lengths are in pixels, brightness in 0..1.
FEATURES = {
    "hue_x": (0.0, 0.7),  # the blob's hue as a point on the unit circle
    "hue_y": (0.0, 0.7),
    "chroma": (0.75, 0.1),  # of the blob's core, mean over frames
    "chroma_change": (0.0, 0.1),  # its standard deviation over frames
    "background": (0.43, 0.37),  # median brightness outside the blob
    "background_noise": (0.0, 0.03),  # spread of the pixels outside the blob
    "flicker": (0.0, 0.03),  # mean change of those pixels from frame to frame
    "size": (17.5, 2.0),  # square root of the area
    "size_change": (0.0, 0.05),  # standard deviation over mean of the area
    "circle_misfit": (0.25, 0.1),  # square roots of the silhouette's distances
    "square_misfit": (0.25, 0.1),
    "triangle_misfit": (0.3, 0.1),
    "softness": (1.0, 2.0),  # width of the half-covered rim: its pixels over four times the square root of the area
    "middle_x": (32.0, 10.0),  # centre of the path
    "middle_y": (32.0, 10.0),
    "travel_x": (0.0, 16.0),  # from the first to the last fifth of the frames
    "travel_y": (0.0, 16.0),
    "wobble": (0.0, 1.0),  # distance of the path from a straight line at constant speed
    "jerk": (0.0, 1.0),  # second differences of the path
    "missing": (0.0, 0.1),  # share of frames without exactly one blob
}
# What a prompt leaves open. Its spread among videos of one prompt is their diversity.
FREE_FEATURES = ("background", "size", "middle_x", "middle_y")
_LIMIT = 6.0  # units: one broken video moves the mean, but must not be all that is measured


def features(video: np.ndarray, seen: Track | None = None) -> np.ndarray:
    """The features of a uint8 video [F, H, W, 3], in their units, clipped: float64 [len(FEATURES)].

    seen: `track(video)`, where it is at hand.
    """
    seen = track(video) if seen is None else seen
    grey = video.astype(np.float32).mean(-1) / 255.0
    outside = ~seen.piece
    both = outside[1:] & outside[:-1]
    flicker = np.abs(np.diff(grey, axis=0))[both]
    values = {
        "background": float(np.median(grey[outside])) if outside.any() else 0.0,
        "background_noise": float(
            np.median([g[o].std() if o.any() else 0.0 for g, o in zip(grey, outside, strict=True)])
        ),
        "flicker": float(flicker.mean()) if flicker.size else 0.0,
        "missing": 1.0 - float(seen.found.mean()),
        **_blob_features(seen, video.shape),
    }
    scaled = np.array([(values[name] - centre) / unit for name, (centre, unit) in FEATURES.items()])
    return np.clip(scaled, -_LIMIT, _LIMIT)


def feature_matrix(videos: Iterable[np.ndarray]) -> np.ndarray:
    """`features` of each video: [N, len(FEATURES)]."""
    return np.stack([features(video) for video in videos])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature matrices [N, d] and [M, d].

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with covariances A and B. D. C. Dowson and B. V. Landau, 1982.

    Raises:
        ValueError: a set has fewer than two videos.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs at least two videos in each set, not {len(a)} and {len(b)}")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    product = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    cross = np.sqrt(np.maximum(product, 0.0)).sum()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return max(0.0, float(gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross))


def largest_differences(a: np.ndarray, b: np.ndarray, count: int = 3) -> list[tuple[str, float]]:
    """The features whose own Fréchet distance (of their means and spreads) is largest, with it."""
    each = (a.mean(0) - b.mean(0)) ** 2 + (a.std(0) - b.std(0)) ** 2
    names = list(FEATURES)
    return [(names[i], float(each[i])) for i in np.argsort(-each)[:count]]


def diversity(matrix: np.ndarray, groups: Sequence[object]) -> float:
    """Root mean square spread, in units, of FREE_FEATURES among videos of one group (those that ask for the same).

    NaN when no group has two videos.
    """
    free = matrix[:, [list(FEATURES).index(name) for name in FREE_FEATURES]]
    members: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    spreads = [free[rows].var(0, ddof=1).mean() for rows in members.values() if len(rows) > 1]
    weights = [len(rows) - 1 for rows in members.values() if len(rows) > 1]
    return float(np.sqrt(np.average(spreads, weights=weights))) if spreads else float("nan")


def _blob_features(seen: Track, shape: tuple[int, ...]) -> dict[str, float]:
    frames = np.flatnonzero(seen.found)
    if len(frames) < 3:  # no path to speak of: a grey, sizeless something in the middle that fits no shape
        nothing = dict.fromkeys(("hue_x", "hue_y", "chroma", "size", "softness", "travel_x", "travel_y"), 0.0)
        worst = dict.fromkeys(("chroma_change", "size_change", "wobble", "jerk"), 1.0)
        misfit = dict.fromkeys(("circle_misfit", "square_misfit", "triangle_misfit"), 1.0)
        return {**nothing, **worst, **misfit, "middle_x": shape[2] / 2, "middle_y": shape[1] / 2}
    path, area, cover = seen.centre[frames], seen.area[frames], seen.cover[frames]
    shots = silhouettes(cover, path, area).mean(0)
    ends = max(1, len(path) // 5)
    first, last = path[:ends].mean(0), path[-ends:].mean(0)
    line = np.stack([np.polyval(np.polyfit(frames, column, 1), frames) for column in path.T], -1)
    bends = np.diff(path, 2, axis=0)
    rim = ((cover > 0.1) & (cover < 0.9)).sum((1, 2)) / (4.0 * np.sqrt(area))
    hue = seen.hue[frames].mean(0)
    misfit = np.sqrt(misfits(shots))
    return {
        "hue_x": float(hue[0]),
        "hue_y": float(hue[1]),
        "chroma": float(seen.chroma[frames].mean()),
        "chroma_change": float(seen.chroma[frames].std()),
        "size": float(np.sqrt(area).mean()),
        "size_change": float(area.std() / area.mean()),
        "circle_misfit": float(misfit[0]),
        "square_misfit": float(misfit[1]),
        "triangle_misfit": float(misfit[2]),
        "softness": float(rim.mean()),
        "middle_x": float((first[0] + last[0]) / 2),
        "middle_y": float((first[1] + last[1]) / 2),
        "travel_x": float(last[0] - first[0]),
        "travel_y": float(last[1] - first[1]),
        "wobble": float(np.sqrt(((path - line) ** 2).sum(-1).mean())),
        "jerk": float(np.sqrt((bends**2).sum(-1).mean())),
    }
