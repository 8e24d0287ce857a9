"""Writes tensors the way torch.save does, without torch.

The archive is what torch 2.13 writes for a dict of tensors: a zip of uncompressed members, each beginning at a multiple
of 64 bytes so that `torch.load(mmap=True)` can map it, with a pickle of protocol 2 that `weights_only=True` accepts.
"""

import os
import struct
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from x2v_jax.checkpoint.files.atomic import CompleteFile, complete_file
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor, Tensor
from x2v_jax.checkpoint.files.torch_globals import DTYPES, STORAGES, UNTYPED
from x2v_jax.errors import UserError

_ALIGNMENT = 64
_ROOT = "archive"
_PIECE = 16 << 20
_WIDE = 0xFFFFFFFF  # in a 32-bit field: the value is in the zip64 field
_TYPED = {dtype: name for name, dtype in STORAGES.items() if name != UNTYPED}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MODULES = {name: name.rpartition(".") for name in (*STORAGES, *(f"torch.{name}" for name in DTYPES))}


def write_torch_file(path: str | os.PathLike[str], tensors: Mapping[str, ArrayLike | LazyTensor]) -> None:
    """Write `tensors` as a flat state_dict that `torch.load(path, weights_only=True)` reads; one at a time in memory.

    Args:
        path: the file, which appears only when it is complete.
        tensors: arrays by name, of any dtype that both torch and NumPy with ml_dtypes have; views become contiguous.

    Raises:
        UserError: an array has another dtype, a name is no string, or the file cannot be written.
    """
    for name in tensors:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may have no types
            raise UserError(f"tensor name {name!r} must be a string.")
    members: list[tuple[str, object]] = [
        ("data.pkl", _pickle(tensors)),
        (".format_version", b"1"),
        (".storage_alignment", str(_ALIGNMENT).encode()),
        ("byteorder", sys.byteorder.encode()),
        *((f"data/{index}", value) for index, value in enumerate(tensors.values())),
        ("version", b"3\n"),
    ]
    size = sum(_nbytes(value) + 512 for _, value in members)
    with complete_file(path, size) as file:
        archive = _Archive(file)
        for name, value in members:
            archive.add(f"{_ROOT}/{name}", value)
        archive.finish()


def _nbytes(value: object) -> int:
    return len(value) if isinstance(value, bytes) else _lazy(value).nbytes


def _lazy(value: object) -> Tensor:
    """`value` as something with a shape, a dtype and nbytes; neither a file nor a device is read for them."""
    return value if isinstance(value, Tensor) else np.asarray(value)


def _data(value: object) -> memoryview:
    if isinstance(value, bytes):
        return memoryview(value)
    array = value.read() if isinstance(value, LazyTensor) else np.asarray(value)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("=") if array.dtype.kind in "iufc" else array.dtype)
    return array.reshape(-1).view(np.uint8).data


# The pickle


def _pickle(tensors: Mapping[str, object]) -> bytes:
    """The pickle of a dict that names storage i for the i-th tensor."""
    parts = [b"\x80\x02}("]
    for index, (name, value) in enumerate(tensors.items()):
        parts += [_string(name), _tensor(name, _lazy(value), str(index))]
    return b"".join([*parts, b"u."])


def _tensor(name: str, value: Tensor, key: str) -> bytes:
    dtype = value.dtype.newbyteorder("=") if value.dtype.kind in "iufc" else value.dtype
    if dtype not in _NAMES:
        raise UserError(f"tensor {name!r} has dtype {dtype}, which torch does not have; convert it, to float32 say.")
    typed = dtype in _TYPED
    storage = _TYPED[dtype] if typed else UNTYPED
    count = value.size if typed else value.nbytes
    strides = [1]
    for n in reversed(value.shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return b"".join(
        [
            _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"),
            b"((" + _string("storage") + _dotted(storage) + _string(key) + _string("cpu") + _integer(count) + b"tQ",
            _integer(0),
            _sizes(value.shape),
            _sizes(strides[: len(value.shape)][::-1]),
            b"\x89" + _global("collections", "OrderedDict") + b")R",  # no gradient, no hooks
            b"" if typed else _dotted(f"torch.{_NAMES[dtype]}"),
            b"tR",
        ]
    )


def _string(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _sizes(values: "tuple[int, ...] | list[int]") -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _dotted(name: str) -> bytes:
    module, _, last = _MODULES[name]
    return _global(module, last)


# The archive


@dataclass(frozen=True)
class _Entry:
    name: bytes
    header: int
    size: int
    checksum: int


class _Archive:
    """A zip archive of stored, aligned members, written from its beginning to its end."""

    def __init__(self, file: CompleteFile):
        self._file = file
        self._position = 0
        self._entries: list[_Entry] = []

    def add(self, name: str, value: object) -> None:
        data = _data(value)
        header, raw_name = self._position, name.encode()
        fixed = header + 30 + len(raw_name)
        wide = struct.pack("<2H2Q", 1, 16, len(data), len(data)) if len(data) >= _WIDE else b""
        # torch fills up with an extra field of its own, "FB" and a run of Z.
        padding = -(fixed + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        start = fixed + len(extra)
        checksum = 0
        for position in range(0, len(data), _PIECE):
            piece = data[position : position + _PIECE]
            checksum = zlib.crc32(piece, checksum)
            self._file.write_at(start + position, piece)
        short = min(len(data), _WIDE)
        # fmt: off
        local = struct.pack("<4s5H3L2H", b"PK\3\4", 45 if wide else 20, 0x800, 0, 0, 0x21, checksum, short, short,
                            len(raw_name), len(extra))
        # fmt: on
        self._file.write_at(header, local + raw_name + extra)
        self._entries.append(_Entry(raw_name, header, len(data), checksum))
        self._position = start + len(data)

    def finish(self) -> None:
        """Write the list of members and the end records."""
        directory = b"".join(map(_central, self._entries))
        count, size, end = len(self._entries), len(directory), self._position + len(directory)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, self._position)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        few = min(count, 0xFFFF)
        last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, _WIDE), min(self._position, _WIDE), 0)
        self._file.write_at(self._position, directory + end64 + locator + last)


def _central(entry: _Entry) -> bytes:
    wide = [value for value in (entry.size, entry.size, entry.header) if value >= _WIDE]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, header = min(entry.size, _WIDE), min(entry.header, _WIDE)
    version = 45 if wide else 20
    # fmt: off
    fixed = struct.pack("<4s6H3L5H2L", b"PK\1\2", version, version, 0x800, 0, 0, 0x21, entry.checksum, size, size,
                        len(entry.name), len(extra), 0, 0, 0, 0, header)
    # fmt: on
    return fixed + entry.name + extra
