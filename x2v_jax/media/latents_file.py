"""Latents that arrive block by block -> one file, without holding them in memory. No jax import."""

import os
import pathlib
import tempfile
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Self

import numpy as np

from x2v_jax.errors import UserError
from x2v_jax.media import tensor_files


class LatentsFile:
    """A context that takes blocks of latents; the file appears at its end, with what there is by then.

    Channels come first in the file and frames in the video, so blocks wait in an unnamed file on the same disk.

    Args:
        path: the final name. Missing folders are made.
        context: latents [f, h, w, C] that the video goes on from, kept in the file too.
        keep: write only the blocks that are needed to have so many last frames, held in memory; None: all.

    Raises:
        UserError: the disk is full, or nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str], *, context: np.ndarray | None = None, keep: int | None = None):
        self._path = pathlib.Path(path)
        self._context = context
        self._keep = keep
        self._recent: deque[np.ndarray] = deque()
        self._waiting: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._state: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        if self._keep is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._waiting = tempfile.TemporaryFile(dir=self._path.parent)
            except OSError as error:
                raise self._refusal(error) from None
        return self

    def append(self, latents: np.ndarray, state: Mapping[str, str]) -> None:
        """The next block, [f, h, w, C] float32, and the header of a file that ends with it."""
        if self._waiting is not None:
            try:
                self._waiting.write(np.ascontiguousarray(latents, np.float32).data)
            except OSError as error:
                raise self._refusal(error) from None
        else:
            self._recent.append(latents)
            while sum(map(len, self._recent)) - len(self._recent[0]) >= (self._keep or 0):
                self._recent.popleft()
                self._context = None  # no longer what comes just before
        self._shape = latents.shape[1:]
        self._state = state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._state:
                tensor_files.write_latents(self._path, self._latents(), self._state, context=self._context)
        finally:
            if self._waiting is not None:
                self._waiting.close()

    def _latents(self) -> np.ndarray:
        if self._waiting is None:
            return np.concatenate(self._recent)
        try:
            self._waiting.flush()
        except OSError as error:
            raise self._refusal(error) from None
        return np.memmap(self._waiting, np.float32, "r").reshape(-1, *self._shape)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"save_latents: {self._path} cannot be written: {error.strerror}; choose another place")


def holds_latents(path: str | os.PathLike[str]) -> bool:
    """Whether a file is latents by its name, and else a video."""
    return pathlib.Path(path).suffix.lower() == ".safetensors"
