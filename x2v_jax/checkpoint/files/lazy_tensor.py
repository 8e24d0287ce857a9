"""Tensors that stay in their file until somebody reads them."""

import dataclasses
import math
import mmap
import os
import pathlib
import stat
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from x2v_jax.errors import UserError

# What a clone without Git LFS has in place of a large file.
LFS_POINTER = b"version https://git-lfs"


@runtime_checkable
class Tensor(Protocol):
    """An array of NumPy, of jax, or in a file: its size and type are known, and `np.asarray` reads its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __array__(self) -> np.ndarray: ...


class MappedFile:
    """A regular file, mapped read-only into memory.

    The mapping lives as long as an array that views it. When the last view of a range goes away its pages are given
    back to the system, so that streaming through a file of 30 GB keeps one tensor resident, not the whole file.

    Raises:
        UserError: the file is missing, unreadable, empty, or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        try:
            # O_NONBLOCK: opening a named pipe that nobody writes to must fail below, not hang here.
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot open {str(self.path)!r}: {reason}. Give the path of a readable file.") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                self.refuse(f"it is {kind}. Give the path of a checkpoint file.")
            if status.st_size == 0:
                self.refuse("it is empty. Download or convert it again.")
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            self.refuse(f"it cannot be mapped into memory ({error.strerror}). Copy it to a local disk.")
        finally:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._map)

    def refuse(self, reason: str) -> NoReturn:
        """Raise the UserError that names this file and `reason` (a clause and a fix, with a full stop)."""
        raise UserError(f"cannot read {str(self.path)!r}: {reason}")

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of the bytes in [start, stop), shorter where the file ends first."""
        return self._map[max(start, 0) : max(stop, 0)]

    def view(self, start: int, length: int) -> np.ndarray:
        """A read-only uint8 array of the `length` > 0 bytes from `start`, without copying."""
        pages = _Pages((length,), np.uint8, self._map, start)
        weakref.finalize(pages, _forget_pages, self._map, start, length).atexit = False
        return pages


class _Pages(np.ndarray):
    """Marks the array that stands for a range of a file.

    NumPy lets a view of a view skip to the memory's owner, but only through arrays of its own type. Because this is
    another type and stands right on the mapping, every view keeps this very object alive: its end is the last one's.
    """


def _forget_pages(mapping: mmap.mmap, start: int, length: int) -> None:
    # Dropping a clean page of a read-only file mapping is always safe: a neighbour that shares it reads it again.
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start - start % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, first, start + length - first)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """An array whose values are still in a file.

    Attributes:
        shape: the sizes of its axes.
        dtype: a NumPy dtype in native byte order; those of ml_dtypes for bfloat16 and 8-bit floats.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _load: Callable[[], np.ndarray] = field(repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that a contiguous copy takes."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, read-only: a view of the memory map, or a copy where the file's layout allows no view."""
        array = self._load()
        array.flags.writeable = False
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype, copy=copy)


def lazy_tensor(
    file: MappedFile,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    strides: tuple[int, ...] | None = None,
    *,
    swap: bool = False,
    finish: Callable[[np.ndarray], np.ndarray] | None = None,
) -> LazyTensor:
    """A tensor whose first element lies at byte `start` of `file`.

    Args:
        file: the file; the caller has checked that every element lies inside it.
        start: offset of the first element in bytes.
        shape: the sizes of its axes, as many as NumPy has at the most (64).
        dtype: element type in native byte order.
        strides: steps along each axis in bytes, none negative; by default those of a C-contiguous array.
        swap: the file holds the other byte order.
        finish: a function applied to the values when they are read; it keeps shape and dtype.
    """

    def load() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        steps = _contiguous_strides(shape, dtype.itemsize) if strides is None else strides
        span = sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + dtype.itemsize
        raw = file.view(start, span)
        if swap:
            # Swapped as plain integers, because the 8- and 16-bit floats of ml_dtypes have one byte order only.
            part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
            raw = raw.copy().view(f"u{part}").byteswap().view(np.uint8)
        elif raw.ctypes.data % dtype.alignment:
            raw = raw.copy()
        # np.ndarray checks once more that these strides stay inside the buffer.
        array = np.ndarray(shape, dtype, buffer=raw.data, strides=steps)
        return array if finish is None else finish(array)

    return LazyTensor(shape, dtype, load)


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor that is produced piece by piece. pieces(): arrays that, put end to end along axis 0, are the tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: object) -> "Streamed":
        values = np.asarray(array)
        return cls(values.shape, values.dtype, lambda: [values])
