"""Reads and writes safetensors files: 8 bytes of header length, a JSON header, and the tensors end to end.

A reader of our own, because the values must stay in the file until they are needed, as arrays of ml_dtypes for the
8- and 16-bit floats, and because a header from a stranger must not be able to make two tensors overlap, leave bytes
that belong to nothing, or point outside the file. The format: https://github.com/huggingface/safetensors (Format).
"""

import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType, TracebackType
from typing import Self, TypeGuard

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.atomic import CompleteFile, complete_file
from x2v_jax.checkpoint.files.json_file import is_json_array, is_json_object
from x2v_jax.checkpoint.files.lazy_tensor import LFS_POINTER, LazyTensor, MappedFile, Tensor, lazy_tensor

# The format allows 100 MB. A Wan2.1 14B header has 0.2 MB; 32 MiB hold 200,000 tensors and bound the parser's memory.
MAX_HEADER = 32 << 20
_SMALLEST_ENTRY = 40  # characters of the shortest description of a tensor
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a file by name, in the header's order, none of them read yet.

    Raises:
        UserError: the file is missing, truncated, or its header breaks a rule of the format; the message names it.
    """
    file = MappedFile(path)
    header, _, data_start = _read_header(file)
    tensors: dict[str, LazyTensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _read_entry(file, name, entry)
        places.append((begin, end, name))
        tensors[name] = lazy_tensor(file, data_start + begin, shape, dtype)
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            fault = "overlaps another" if begin < reached else f"leaves a hole of {begin - reached:,} bytes before it"
            file.refuse(f"its tensor {_short(name)} {fault}. Download or convert it again.")
        reached = end
    available = len(file) - data_start
    if reached != available:
        fault = "is truncated" if reached > available else "has bytes that belong to no tensor"
        file.refuse(f"it {fault}: its header describes {reached:,} bytes and {available:,} follow. Download it again.")
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The free text that the header carries, empty if it has none.

    Raises:
        UserError: the file is missing or its header is not one.
    """
    _, metadata, _ = _read_header(MappedFile(path))
    return metadata


def without_advice(text: str) -> str:
    """What is wrong with a file, without what to do about one that was downloaded.

    >>> without_advice("it is truncated. Download or convert it again.")
    'it is truncated'
    """
    return re.sub(r"\.?( (Download|Convert)[^.]*? again\.?| Is it [^.]*\?)?\Z", "", text)


def _read_header(file: MappedFile) -> tuple[dict[str, object], dict[str, str], int]:
    """The header's JSON object without its free text, that text, and the position of the data."""
    if len(file) < 8:
        file.refuse("it is too short to be a safetensors file. Download it again.")
    if file.bytes(0, min(len(file), len(LFS_POINTER))) == LFS_POINTER:
        file.refuse("it is a Git LFS pointer, not the file itself. Download the file that it stands for.")
    (length,) = struct.unpack("<Q", file.bytes(0, 8))
    if length > MAX_HEADER:
        file.refuse(f"its header says it is {length:,} bytes long; {MAX_HEADER:,} is the most. Is it safetensors?")
    if 8 + length > len(file):
        file.refuse(f"it is truncated: its header has {length:,} bytes and the file {len(file):,}. Download it again.")
    raw = file.bytes(8, 8 + length)
    if not raw.startswith(b"{"):
        file.refuse("its header does not begin with '{'. Is it a safetensors file?")
    if raw.count(b"{") > 2 + length // _SMALLEST_ENTRY or raw.count(b"[") > 2 + 2 * length // _SMALLEST_ENTRY:
        file.refuse("its header nests more brackets than tensors need. Download it again.")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for name, value in pairs:
            if name in result:
                file.refuse(f"its header has the key {_short(name)} twice. Download or convert it again.")
            # JSON can escape half a surrogate pair, which is no text and could not be printed.
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                file.refuse(f"its header has the key {_short(name)}, which is not Unicode text. Convert it again.")
            result[name] = value
        return result

    try:
        header: dict[str, object] = json.loads(raw.decode(), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        file.refuse(f"its header is not JSON in UTF-8 ({str(error)[:80]}). Download it again.")
    except ValueError as error:
        # An integer of thousands of digits; a UserError of ours passes through.
        if type(error) is not ValueError:
            raise
        file.refuse("its header has a number that is far too long. Download it again.")
    metadata = header.pop(_METADATA, {})
    if not _is_text(metadata):
        file.refuse("its '__metadata__' is not a mapping of strings to strings. Convert it again.")
    return header, metadata, 8 + length


def _read_entry(file: MappedFile, name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not is_json_object(entry) or entry.keys() != _ENTRY_KEYS:
        file.refuse(f"its tensor {_short(name)} must have just dtype, shape and data_offsets. Convert it again.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if type(code) is str else None
    if dtype is None:
        file.refuse(f"its tensor {_short(name)} has the dtype {_short(code)}, which is none of {', '.join(DTYPES)}.")
    if not _are_counts(shape) or len(shape) > 64:
        file.refuse(f"its tensor {_short(name)} has the shape {_short(shape)}, not a list of sizes. Convert it again.")
    if not _are_counts(offsets) or len(offsets) != 2:
        file.refuse(f"its tensor {_short(name)} has the data_offsets {_short(offsets)}, not two positions.")
    # In Python's integers, which cannot overflow; an array with a zero axis must still be one that NumPy can make.
    nbytes = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != nbytes or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        file.refuse(
            f"its tensor {_short(name)} of shape {_short(shape)} and dtype {code} has {_short(nbytes)} bytes, but"
            f" its data_offsets are {_short(offsets)}. Download or convert it again."
        )
    return dtype, tuple(shape), begin, end


def _is_text(metadata: object) -> TypeGuard[dict[str, str]]:
    return is_json_object(metadata) and all(type(value) is str for value in metadata.values())


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return is_json_array(values) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class SafetensorsWriter(AbstractContextManager["SafetensorsWriter"]):
    """A context that writes a file tensor by tensor; the file appears at `path` when the context ends without error.

    Args:
        path: the final name.
        tensors: (shape, dtype) of every tensor that will be written, by name.
        metadata: free text for the header.

    Raises:
        ValueError: on an array of another shape or dtype, on a tensor or part that is unknown or written twice, and at
            the context's end if one is missing.
        UserError: the disk is full, or the file cannot be written there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype | type[object]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = pathlib.Path(path)
        self._specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        self._header, self._starts, size = _layout(self._specs, dict(metadata or {}))
        self._context = complete_file(self.path, len(self._header) + size)
        self._file: CompleteFile | None = None
        # Parts still to be written; None stands for the whole tensor.
        self._missing: dict[str, set[int] | None] = dict.fromkeys(self._specs)

    def __enter__(self) -> Self:
        self._file = self._context.__enter__()
        try:
            self._file.write_at(0, self._header)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None and self._missing:
            error = ValueError(f"{self.path}: tensors or parts not written: {', '.join(sorted(self._missing)[:5])}")
            kind = ValueError
            self._context.__exit__(kind, error, trace)
            raise error
        return self._context.__exit__(kind, error, trace)

    def write(self, name: str, array: Tensor) -> None:
        """Write the whole tensor `name`."""
        shape, dtype = self._spec(name)
        if name not in self._missing or self._missing[name] is not None:
            raise ValueError(f"{self.path}: tensor {name!r} is written twice")
        self._put(name, 0, array, shape, dtype)
        del self._missing[name]

    def write_part(self, name: str, index: int, array: Tensor) -> None:
        """Write tensor[index], with `index` along axis 0."""
        shape, dtype = self._spec(name)
        if not shape or not 0 <= index < shape[0]:
            raise ValueError(f"{self.path}: tensor {name!r} of shape {shape} has no part {index}")
        left = self._missing.get(name, set())
        left = set(range(shape[0])) if left is None else left
        if index not in left:
            raise ValueError(f"{self.path}: part {index} of tensor {name!r} is written twice")
        self._put(name, index * math.prod(shape[1:]) * dtype.itemsize, array, shape[1:], dtype)
        self._missing[name] = left - {index}
        if not self._missing[name]:
            del self._missing[name]

    def _spec(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        if name not in self._specs:
            raise ValueError(f"{self.path}: tensor {name!r} was not announced")
        return self._specs[name]

    def _put(self, name: str, offset: int, array: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if self._file is None:
            raise ValueError(f"{self.path}: tensors can be written only inside the context")
        values = array.read() if isinstance(array, LazyTensor) else np.asarray(array)
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"{self.path}: {name!r} should be {dtype} of shape {shape}, not {values.dtype} of shape {values.shape}"
            )
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        self._file.write_at(self._starts[name] + offset, data)


def _layout(
    specs: dict[str, tuple[tuple[int, ...], np.dtype]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The bytes before the data, where each tensor begins in the file, and the bytes of all tensors."""
    if not all(type(text) is str for item in metadata.items() for text in item):
        raise ValueError("metadata must map strings to strings")
    header: dict[str, object] = {_METADATA: metadata} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    # Larger elements first, as the reference implementation has it: then each tensor begins at a multiple of its own.
    for name in sorted(specs, key=lambda name: (-specs[name][1].itemsize, name)):
        shape, dtype = specs[name]
        if dtype not in _CODES or name == _METADATA:
            raise ValueError(f"tensor {name!r} of dtype {dtype} cannot be stored in a safetensors file")
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        offsets[name] = position
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    return raw, {name: len(raw) + offset for name, offset in offsets.items()}, position
