"""The line that says how a video block by block comes along."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from x2v_jax.memory import device

# Between two lines where there is no terminal on which one line could be kept up to date.
_SECONDS_APART = 5.0


class LiveLine:
    """Blocks, speed, lead over a player, and memory: a bar on a terminal, elsewhere a line every few seconds.

    Speed and lead are counted from the first block on, so that they leave out compiling: the lead is what a player that
    began with the first block still has to show.

    Args:
        label: in front of each line.
        blocks: how many there will be; None where nobody knows.
        fps: frames a second of the video.
        shown: False for a line that says nothing.
        clock, output: for tests.
    """

    def __init__(
        self,
        label: str,
        blocks: int | None,
        fps: float,
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        output: TextIO | None = None,
    ):
        self._label, self._blocks, self._fps, self._clock = label, blocks, fps, clock
        self._output = sys.stderr if output is None else output
        self._bar = None
        self._shown = shown
        self._done, self._frames = 0, 0
        self._first: tuple[float, int] | None = None  # when the first block was there, and its frames
        self._printed = -_SECONDS_APART
        if shown and self._output.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=blocks, desc=label, unit="block", file=self._output)

    def update(self, frames: int, seconds: float) -> None:
        """A block of so many frames is there; `seconds` is what making it took."""
        now = self._clock()
        self._done, self._frames = self._done + 1, self._frames + frames
        if self._first is None:
            self._first, speed = (now, frames), frames / max(seconds, 1e-9)
        else:
            speed = (self._frames - self._first[1]) / max(now - self._first[0], 1e-9)
        ahead = self._frames / self._fps - (now - self._first[0])
        text = f"{speed:.1f} frames/s, {ahead:+.1f} s ahead of real time, {device.peak_bytes() / 1e9:.2f} GB"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._shown and (now - self._printed >= _SECONDS_APART or self._done in (1, self._blocks)):
            self._printed = now
            block = f"block {self._done}" + ("" if self._blocks is None else f"/{self._blocks}")
            print(f"{self._label}: {block}, {self._frames} frames, {text}", file=self._output, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
