"""A set of videos and all that is measured of it."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.tiny_world.frechet import features
from train.shapes.judge import Verdict, summarize, track, verdict

Names = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Examined:
    """wanted: (colour, shape, direction) of each video; verdicts: what it shows; features: [N, d] for distances.

    seconds and batch_sizes: how long each batch of videos took to come, and how many it held. videos: uint8, if kept.
    """

    wanted: Sequence[Names]
    verdicts: Sequence[Verdict]
    features: np.ndarray
    seconds: Sequence[float]
    batch_sizes: Sequence[int]
    videos: Sequence[np.ndarray]

    @property
    def right(self) -> list[bool]:
        return [seen.names == asked for seen, asked in zip(self.verdicts, self.wanted, strict=True)]

    def summary(self) -> dict[str, float]:
        return summarize(self.verdicts, self.wanted)

    def row(self, i: int) -> dict[str, Any]:
        """Video i as JSON values."""
        return {"wanted": self.wanted[i], "right": self.right[i], **dataclasses.asdict(self.verdicts[i])}


def examine(
    batches: Iterable[np.ndarray], wanted: Sequence[Names], *, name: str, progress: bool = True, keep: bool = False
) -> Examined:
    """Judges videos as they come.

    Args:
        batches: uint8 [B, F, H, W, 3] each.
        wanted: what each video should show.
        name: for the progress bar.
        progress: whether there is one.
        keep: keep the videos.
    """
    verdicts, rows, seconds, sizes, videos = [], [], [], [], []
    since = time.monotonic()
    with tqdm(total=len(wanted), desc=name, unit="video", disable=not progress) as bar:
        for batch in batches:
            seconds.append(time.monotonic() - since)
            sizes.append(len(batch))
            for video in batch:
                seen = track(video)
                verdicts.append(verdict(seen))
                rows.append(features(video, seen))
            if keep:
                videos.extend(batch)
            bar.update(len(batch))
            since = time.monotonic()
    return Examined(wanted, verdicts, np.stack(rows), seconds, sizes, videos)
