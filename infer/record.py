"""One video of a causal checkpoint: each block goes to the file, and to a live line, as soon as it is there."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.media.growing_mp4 import VideoStream
from x2v_jax.memory import device

from . import outputs
from .settings import Job, Settings

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline


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


def stream_video(
    pipeline: "Pipeline", settings: Settings, job: Job, label: str, interrupts: Interrupts
) -> tuple[pathlib.Path, dict[str, float]]:
    """Makes one video into a growing mp4, with the live line if the settings have it.

    Whatever ends the run, the file is whole up to its last block and its JSON is beside it, with "interrupted" in it
    where blocks are lacking.

    Returns:
        The file, and the seconds that all blocks together took, by the pipeline's names and "file".

    Raises:
        UserError: see `Pipeline.stream_blocks` and `VideoStream.append`.
        KeyboardInterrupt: with a message about what was kept, if there is something.
    """
    recording = _Recording(settings, job, interrupts)
    live = LiveLine(label, job.request.num_blocks, recording.fps, shown=settings.config.progress)
    try:
        try:
            with contextlib.closing(live), contextlib.closing(pipeline.stream_blocks(job.request)) as blocks:
                for block in blocks:
                    recording.add(block)
                    live.update(len(block.frames), sum(block.seconds.values()))
                recording.is_complete = True
        finally:
            recording.close()
    except KeyboardInterrupt:
        recording.close()  # where the signal came just before the other one; none interrupts this one
        if recording.kept():
            print(recording.stream.path, flush=True)
        raise KeyboardInterrupt(recording.kept()) from None
    except Exception:
        if recording.kept():
            print(recording.kept(), file=sys.stderr)
        raise
    return recording.stream.path, recording.seconds


class _Recording:
    """The mp4 and its JSON. No signal interrupts their writing: it waits until that is done."""

    def __init__(self, settings: Settings, job: Job, interrupts: Interrupts):
        self.fps: float = job.request.fps
        self.seconds: dict[str, float] = {}
        self.is_complete = False
        self._metadata = outputs.metadata(settings, job)
        self.stream = VideoStream(
            outputs.place(job, settings.config.existing), self.fps, outputs.carried(settings, self._metadata)
        )
        self._interrupts = interrupts
        self._size: tuple[int, ...] = ()
        self._is_closed = False

    def add(self, block: Any) -> None:
        """Writes a block. The device is at work on the next one meanwhile, so it costs no time while it is quicker."""
        clock = Clock()
        with self._interrupts.held(), clock("file"):
            self._size = block.frames.shape[1:3]
            self.stream.append(block.frames)
        for name, value in [*block.seconds.items(), *clock.seconds.items()]:
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def close(self) -> None:
        """Writes the JSON. The second time, it does nothing."""
        with self._interrupts.held():
            if self._is_closed:
                return
            self._is_closed = True
            if not self.stream.num_frames:
                return
            metadata = outputs.with_size(self._metadata, self.stream.num_frames, *self._size)
            try:
                self.stream.close(metadata if self.is_complete else metadata | {"interrupted": True})
            except UserError as error:
                if self.is_complete:
                    raise
                print(f"warning: {error}", file=sys.stderr)  # what ended the run is the error to be told

    def kept(self) -> str:
        """What to say about a video that was not finished."""
        frames = self.stream.num_frames
        return f"{self.stream.path} is kept with {frames} frames ({frames / self.fps:.1f} s)" if frames else ""
