"""Who attends to whom in a block-causal video model. No jax import, so error messages come fast.

A video is made in blocks of frames. Frames of a block attend to each other in both directions, and to earlier blocks as
far as a window reaches; a sink of first frames can stay visible for ever.
"""

import dataclasses
from collections.abc import Iterator

from x2v_jax.errors import UserError

# Rotary angles of frame numbers below this are exact (rope.py): 73 hours at 4 latent frames a second.
MAX_FRAMES = 1 << 20


@dataclasses.dataclass(frozen=True)
class CausalPattern:
    """Blocks, window and sink, all counted in latent frames.

    Attributes:
        block: frames made together.
        window: the most frames that a block attends to, itself and the sink included; None: all before it.
        sink: so many first frames are never left out of the window.
        independent_first_frame: frame 0 is a block of its own (models that continue a single image).
    """

    block: int
    window: int | None = None
    sink: int = 0
    independent_first_frame: bool = False

    def __post_init__(self):
        check_whole("block", self.block, 1)
        check_whole("sink", self.sink, 0)
        if self.window is not None:
            check_window(self.window, self.sink, self.block)

    def blocks(self, num_frames: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each block of a video of `num_frames`; the last may be cut short."""
        start = 0
        while start < num_frames:
            length = 1 if start == 0 and self.independent_first_frame else self.block
            stop = min(start + length, num_frames)
            yield start, stop
            start = stop

    def visible(self, stop: int) -> tuple[int, int]:
        """(sink, first): a block that ends before `stop` attends to the frames [0, sink) and [first, stop)."""
        if self.window is None or stop <= self.window:
            return 0, 0
        return self.sink, stop - (self.window - self.sink)


def check_window(window: int, sink: int, block: int) -> None:
    """Raises UserError unless a window holds the sink and the block that is being made."""
    check_whole("window", window, 1)
    if window < sink + block:
        raise UserError(
            f"window is {window} frames; it has to hold the sink ({sink}) and one block ({block}), so give at least "
            f"{sink + block}"
        )


def check_whole(field: str, value: object, least: int) -> None:
    """Raises UserError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{field} is {value!r}; give a whole number of at least {least}")
