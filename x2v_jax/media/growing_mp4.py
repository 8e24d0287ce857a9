"""An mp4 that can be watched while it is being made.

It is a fragmented mp4 (ISO/IEC 14496-12, 8.8): a header, then for each appended block a `moof` box, which says where
the block's frames lie, and an `mdat` box, which holds them. A block is encoded on its own, from a key frame to its last
frame, so nothing of it waits in the encoder for a later one, and memory does not grow with the video. Against one
encoder for all frames that costs size: 1.4 times the bytes at 480x832 in blocks of 12 frames.

The file therefore grows under its final name, unlike all others that this project writes. It appears there with its
first block, whole, and what it holds after that is playable at any moment, whether the program is at work, ended or was
killed: a fragment is first written as a `free` box, which readers skip, and becomes a `moof` box by one write of four
bytes when all of it is there.
"""

import contextlib
import errno
import os
import pathlib
import struct
from collections.abc import Generator, Mapping
from typing import Self

import numpy as np

from x2v_jax.errors import UserError
from x2v_jax.media.video import Path, encode_video, frame_rate, settings_file, write_files

# No fragment before the encoder ends; frames count from 0 although B-frames are decoded ahead of their turn.
_FLAGS = "empty_moov+default_base_moof+negative_cts_offsets+frag_custom"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class VideoStream:
    """A growing mp4 with the colours and quality of `video.write_video`.

    Closing it writes the JSON beside it. As a context manager it is closed without.

    Args:
        path: NAME.mp4. Missing folders are made; existing files are replaced when the first block is there.
        fps: frames a second.
        metadata: JSON values for the file's `comment` tag, which is in its header: what is known before the first
            frame. It can be read back with `video.read_metadata`.

    >>> with VideoStream("long.mp4", 16) as stream:
    ...     for block in np.zeros((3, 4, 64, 96, 3), np.uint8):
    ...         stream.append(block)
    """

    def __init__(self, path: Path, fps: float, metadata: Mapping[str, object] | None = None):
        self.path = pathlib.Path(path)
        self.num_frames = 0
        self._fps, self._metadata = fps, metadata
        self._size: tuple[int, ...] | None = None  # height and width
        self._descriptor: int | None = None
        self._written = 0  # bytes of the header and the finished fragments
        self._fragments = 0
        self._timescale = 0  # ticks of the file's clock in a second

    def append(self, frames: np.ndarray) -> None:
        """Adds a block; when this returns, the block is in the file for every other program to read.

        Args:
            frames: uint8 [F, H, W, 3], of the same size each time.

        Raises:
            UserError: frames of another size or kind, or they cannot be written: the disk is full, …. The blocks
                before stay playable.
        """
        if self._size not in (None, frames.shape[1:3]):
            raise UserError(
                f"frames are {frames.shape[1:3]} in a video of {self._size}; give the same height and width"
            )
        data = bytearray(encode_video(frames, self._fps, None if self._fragments else self._metadata, movflags=_FLAGS))
        begin, end = _span(data, "moof")[0], _span(data, "mdat")[1]
        if not self._fragments:
            self._timescale = struct.unpack_from(">I", data, _span(data, "moov/trak/mdia/mdhd")[0] + 20)[0]
        self._place(data)
        if self._descriptor is None:
            self._begin(data[:end])
        else:
            self._write(data[begin:end])
        self._size = frames.shape[1:3]
        self._fragments += 1
        self.num_frames += len(frames)

    def close(self, metadata: Mapping[str, object] | None = None) -> None:
        """Brings the video safely to the disk, and with metadata writes it as JSON beside it. May be called again.

        Raises:
            UserError: the JSON cannot be written.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            with _explained(self):
                os.ftruncate(descriptor, self._written)  # of a fragment that was being written
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if metadata is not None:
            write_files(settings_file(self.path, metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _place(self, data: bytearray) -> None:
        """Gives the fragment its number and its time, which its own encoder counted from 1 and 0."""
        ticks = self.num_frames * self._timescale / frame_rate(self._fps)
        struct.pack_into(">I", data, _span(data, "moof/mfhd")[0] + 12, self._fragments + 1)
        struct.pack_into(">Q", data, _span(data, "moof/traf/tfdt")[0] + 12, round(ticks))

    def _begin(self, data: bytes | bytearray) -> None:
        write_files({self.path: bytes(data)})
        # Settings of a video that was replaced would be taken for this one's if the program is killed.
        self.path.with_suffix(".json").unlink(missing_ok=True)
        with _explained(self):
            self._descriptor = os.open(self.path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
        self._written = len(data)

    def _write(self, fragment: bytearray) -> None:
        assert self._descriptor is not None
        kind, fragment[4:8] = fragment[4:8], b"free"
        try:
            with _explained(self):
                _write_all(self._descriptor, fragment, self._written)
                _write_all(self._descriptor, kind, self._written + 4)
        except UserError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._written)
            raise
        self._written += len(fragment)


@contextlib.contextmanager
def _explained(stream: VideoStream) -> Generator[None]:
    try:
        yield
    except OSError as error:
        full = "; the disk or the quota is full, so free some space" if error.errno in _FULL else ""
        raise UserError(
            f"cannot go on writing {str(stream.path)!r}: {error.strerror or error}{full}. Its first "
            f"{stream.num_frames} frames are kept and playable"
        ) from error


def _write_all(descriptor: int, data: bytes | bytearray, position: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, position)
        view, position = view[done:], position + done


def _span(data: bytes | bytearray, path: str) -> tuple[int, int]:
    """First and last + 1 byte of the first box at a path of box types, such as moof/traf/tfdt."""
    begin, end = 0, len(data)
    for depth, name in enumerate(path.split("/")):
        if depth:
            begin += 8  # the box's own size and type
        while data[begin + 4 : begin + 8] != name.encode():
            begin += struct.unpack_from(">I", data, begin)[0]
            if begin + 8 > end:
                raise ValueError(f"the muxer wrote no {path} box")
        end = begin + struct.unpack_from(">I", data, begin)[0]
    return begin, end
