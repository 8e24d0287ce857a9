"""Reads the LMDB data sets of CausVid and Self-Forcing: latents or ODE pairs with prompts, and first frames.

Keys (Self-Forcing utils/lmdb.py, CausVid ode_data/create_lmdb_iterative.py): `latents_{i}_data` little-endian float16,
`latents_shape` as text ("N 21 16 60 104", or "N T 21 16 60 104" for T states of a trajectory, noise first),
`prompts_{i}_data` UTF-8, and `img_{i}_data` uint8 RGB in Self-Forcing-Plus. Latents are normalised with the VAE's
mean and standard deviation, channels second; here they come out channels last.
"""

import bisect
import itertools
import math
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import einops
import numpy as np
from jaxtyping import Float, UInt8

from x2v_jax.errors import UserError

from .latents import LatentCache, LatentSize, require_latent_size

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint

DATA_FILE = "data.mdb"
# img_shape is not reliable there; this is the size that Self-Forcing-Plus writes.
_IMAGE_SHAPE = (480, 832, 3)

# One environment may be open only once in a process.
_open: "weakref.WeakValueDictionary[str, _Environment]" = weakref.WeakValueDictionary()


class _Environment:
    """One LMDB folder."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            import lmdb
        except ImportError:
            raise UserError(f"{path} is an LMDB, which needs the package lmdb: pip install lmdb") from None
        try:
            # Without locks: nobody writes these, and folders of data sets are often read-only.
            self._lmdb = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise UserError(f"{path} cannot be read as an LMDB ({error}); copy it again") from None
        self.shape = self._shape()

    def get(self, key: str) -> bytes | None:
        with self._lmdb.begin(buffers=False) as transaction:
            return transaction.get(key.encode())

    def row(self, row: int) -> np.ndarray:
        """float16, as it is stored."""
        data = self._needed(f"latents_{row}_data")
        if len(data) != 2 * math.prod(self.shape[1:]):
            raise UserError(
                f"{self.path}: latents_{row}_data has {len(data)} bytes and latents_shape ({_text(self.shape)}) asks "
                f"for {2 * math.prod(self.shape[1:])}; the data set is damaged or was not written to its end"
            )
        return np.frombuffer(data, "<f2").reshape(self.shape[1:])

    def prompt(self, row: int) -> str:
        try:
            return self._needed(f"prompts_{row}_data").decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: prompts_{row}_data is not UTF-8 text; write the data set again") from None

    def image(self, row: int) -> np.ndarray:
        data = self._needed(f"img_{row}_data")
        stated = self.get("img_shape")
        shapes = [_numbers(stated)[-3:]] if stated else []
        for shape in (*shapes, _IMAGE_SHAPE):
            if len(shape) == 3 and math.prod(shape) == len(data) and shape[-1] == 3:
                return np.frombuffer(data, np.uint8).reshape(shape)
        raise UserError(f"{self.path}: img_{row}_data has {len(data)} bytes, which is no {_text(_IMAGE_SHAPE)} picture")

    def _needed(self, key: str) -> bytes:
        data = self.get(key)
        if data is None:
            raise UserError(f"{self.path}: has no {key}; the data set was not written to its end")
        return data

    def _shape(self) -> tuple[int, ...]:
        stated = self.get("latents_shape")
        if stated is None:
            raise UserError(f"{self.path} has no latents_shape; give an LMDB as CausVid and Self-Forcing write it")
        shape = _numbers(stated)
        if len(shape) not in (5, 6) or 0 in shape:
            raise UserError(
                f"{self.path}: latents_shape is {stated[:80].decode(errors='replace')!r}, not N [T] frames channels "
                "height width (CausVid's script writes 0 when its last file was a duplicate); write the data set again"
            )
        if self.get(f"latents_{shape[0]}_data") is not None:
            raise UserError(f"{self.path} says that it has {shape[0]} rows and holds more; write the data set again")
        return shape


class LmdbData:
    """An LMDB, or a folder of LMDBs (`shard_0`, `shard_1`, …), read by row.

    Attributes:
        path: the folder.
        latent_size: frames, height, width and channels.
        num_states: states of a trajectory; 1 where there are only clean latents.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens it.

        Raises:
            UserError: no LMDB, or one of another layout, or parts that do not fit each other.
        """
        self.path = pathlib.Path(path)
        folders = [self.path] if (self.path / DATA_FILE).is_file() else _parts(self.path)
        self._parts = [_environment(folder) for folder in folders]
        shapes = {part.shape[1:] for part in self._parts}
        if len(shapes) > 1:
            names = ", ".join(f"{part.path.name} {_text(part.shape[1:])}" for part in self._parts[:4])
            raise UserError(f"{self.path}: its parts hold rows of different shapes ({names}); keep those of one shape")
        *states, f, c, h, w = self._parts[0].shape[1:]
        self.num_states: int = states[0] if states else 1
        self.latent_size: LatentSize = (f, h, w, c)
        self._starts = [0, *itertools.accumulate(part.shape[0] for part in self._parts)]
        self._captions: list[str] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], latent_size: Sequence[int] | None = None) -> Self:
        """Opens it for a trainer that needs latents of a size; None takes any.

        Raises:
            UserError: as the constructor, or latents of another size.
        """
        data = cls(path)
        require_latent_size(str(path), data.latent_size, latent_size)
        return data

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def captions(self) -> list[str]:
        """The prompts, by row."""
        if self._captions is None:
            self._captions = [part.prompt(row) for part in self._parts for row in range(part.shape[0])]
        return self._captions

    @property
    def has_images(self) -> bool:
        return all(part.get("img_0_data") is not None for part in self._parts)

    def latents(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n f h w c"]:
        """The clean latents (the last state of a trajectory), float32 [n, f, h, w, C].

        Raises:
            IndexError: there is no such row.
            UserError: the row is missing or has another size.
        """
        return self.states(rows)[:, -1]

    def states(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n s f h w c"]:
        """All states, float32 [n, num_states, f, h, w, C], noise first, the clean end last."""
        read = [part.row(row) for part, row in map(self.locate, rows)]
        stacked = np.stack(read).astype(np.float32).reshape(len(read), self.num_states, *read[0].shape[-4:])
        return np.ascontiguousarray(einops.rearrange(stacked, "n s f c h w -> n s f h w c"))

    def image(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame of a row, where the data set has pictures."""
        part, own = self.locate(row)
        return part.image(own)

    def prompt(self, row: int) -> str:
        part, own = self.locate(row)
        return part.prompt(own)

    def require(self, checkpoint: "NativeCheckpoint") -> None:
        """Does nothing: these data sets do not say which VAE made them. (As `LatentCache.require`.)"""

    def locate(self, row: int) -> tuple[_Environment, int]:
        """The part that holds a row, and the row's number in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, and row {row} is none of them")
        part = bisect.bisect_right(self._starts, row) - 1
        return self._parts[part], int(row) - self._starts[part]


def is_lmdb(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is an LMDB or a folder of them."""
    folder = pathlib.Path(path)
    return folder.is_dir() and ((folder / DATA_FILE).is_file() or any(folder.glob(f"*/{DATA_FILE}")))


def open_latents(path: str | os.PathLike[str], latent_size: Sequence[int] | None = None) -> LatentCache | LmdbData:
    """Clean latents with captions, whichever of the two kinds of folder they are in.

    Raises:
        UserError: neither kind, or latents of another size.
    """
    return LmdbData.open(path, latent_size) if is_lmdb(path) else LatentCache.open(path, latent_size)


def _environment(folder: pathlib.Path) -> _Environment:
    key = os.path.realpath(folder)
    found = _open.get(key)
    if found is None:
        found = _open[key] = _Environment(folder)
    return found


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    parts = [file.parent for file in path.glob(f"*/{DATA_FILE}")] if path.is_dir() else []
    if not parts:
        what = "holds no LMDB" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give the folder of a {DATA_FILE}, or a folder of such folders")

    def natural(folder: pathlib.Path) -> tuple[Any, ...]:
        digits = "".join(filter(str.isdigit, folder.name))
        return (int(digits) if digits else -1, folder.name)  # shard_10 comes after shard_2

    return sorted(parts, key=natural)


def _numbers(text: bytes) -> tuple[int, ...]:
    words = text.split()
    return tuple(int(word) for word in words) if all(word.isdigit() and len(word) < 12 for word in words) else ()


def _text(shape: Sequence[int]) -> str:
    return " ".join(map(str, shape))
