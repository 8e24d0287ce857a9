"""One video of a causal checkpoint: each block goes to the file as soon as it is there."""

import contextlib
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.media.growing_mp4 import VideoStream

from . import outputs
from .live import LiveLine
from .settings import Job, Settings

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline


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
