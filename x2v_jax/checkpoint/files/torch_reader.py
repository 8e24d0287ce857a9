"""Reads what torch.save writes, without torch and without executing anything in the file.

Two formats: the zip archive of torch 1.6 and later (a pickle, and one uncompressed member for each storage), and the
"legacy" run of pickles before it, followed by the storages. Storages are mapped, not read, so that opening a file of
30 GB takes as long as its pickle, and every claim in the pickle is checked against the bytes that are really there.
Checksums are not compared: that would read the whole file, and torch can be told not to write them.
"""

import math
import os
from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import LFS_POINTER, LazyTensor, MappedFile, lazy_tensor
from x2v_jax.checkpoint.files.pickle_reader import (
    MAX_BYTES,
    Global,
    Interpreter,
    Record,
    is_dict,
    is_list,
    is_tuple,
    shorten,
)
from x2v_jax.checkpoint.files.torch_globals import GLOBALS, STORAGES, UNTYPED, Storage, TensorRecord, is_count, show
from x2v_jax.checkpoint.files.zip_index import read_members

MAX_DEPTH = 64  # of containers inside containers
MAX_VALUES = 4_000_000  # that a walk over the result meets, shared ones counted each time
MAX_REPEATED = 256 << 20  # bytes of a tensor that is larger than its storage, as torch's expand() makes it

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP = (b"PK\3\4", b"PK\5\6")
_Place = Callable[[Storage], tuple[int, int]]


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """What `torch.save` put into `path`: nested dicts, lists, tuples and plain values with a LazyTensor per tensor.

    Parameters become tensors, an OrderedDict or a Namespace a dict, dtypes NumPy's, devices and paths strings.

    Args:
        path: a .pth, .pt, .ckpt or .bin file in torch's zip or legacy format.

    Raises:
        UserError: the file is missing, damaged, of another format, or contains anything but tensors and plain values;
            the message names the global or the member that is refused. Nothing from the file is ever executed.
    """
    file = MappedFile(path)
    head = file.bytes(0, 512)
    if head.startswith(_ZIP):
        return _read_zip(file)
    if head[:1] == b"\x80":
        return _read_legacy(file)
    if head[257:262] == b"ustar":
        file.refuse("it is a tar archive, torch's format of 2016. Load it with an old torch and save it again.")
    if head[8:9] == b"{":
        file.refuse("it looks like a safetensors file. Give it the ending .safetensors.")
    if head.startswith(LFS_POINTER):
        file.refuse("it is a Git LFS pointer, not the file itself. Download the file that it stands for.")
    file.refuse(f"it does not begin as a file of torch.save does, but with {head[:8]!r}. Download it again.")


def _read_zip(file: MappedFile) -> object:
    members = read_members(file)
    roots = {name.split("/")[0] for name in members}
    root = roots.pop() if len(roots) == 1 else ""
    pickle = members.get(f"{root}/data.pkl")
    if pickle is None:
        file.refuse("it is a zip archive without the one folder and its 'data.pkl' that torch.save writes.")
    if pickle.size > MAX_BYTES:
        file.refuse(f"its member {pickle.name!r} has {pickle.size:,} bytes, which no checkpoint needs.")
    order = "little"  # what files without the member are
    if note := members.get(f"{root}/byteorder"):
        order = file.bytes(note.start, note.start + min(note.size, 16)).decode("latin1")
        if order not in ("little", "big"):
            file.refuse(f"its member {note.name!r} says {order!r}; it must be 'little' or 'big'. Download it again.")

    def load_persistent(identifier: object) -> Storage:
        return _storage(file, identifier, 5)

    def place(storage: Storage) -> tuple[int, int]:
        member = members.get(f"{root}/data/{storage.key}")
        if member is None:
            file.refuse(f"the storage {shorten(storage.key)} that a tensor needs is missing. Download it again.")
        if member.size < storage.size * storage.dtype.itemsize:
            file.refuse(
                f"its member {shorten(member.name)} has {member.size:,} bytes, too few for the {storage.size:,}"
                f" elements of {storage.dtype} that its pickle claims. Download it again."
            )
        return member.start, storage.size

    data = file.bytes(pickle.start, pickle.start + pickle.size)
    vm = Interpreter(data, file.refuse)
    value = vm.load(GLOBALS, load_persistent)
    if vm.position != len(data):
        vm.damaged("bytes follow its end")
    return _Result(file, place, order == "big").plain(value)


def _read_legacy(file: MappedFile) -> object:
    vm = Interpreter(file.bytes(0, MAX_BYTES + (1 << 20)), file.refuse)
    if vm.load() != _MAGIC:
        file.refuse("it is a pickle but not one that torch.save wrote (wrong magic number). Save it with torch.save.")
    if (protocol := vm.load()) != _PROTOCOL:
        file.refuse(
            f"its protocol is {shorten(protocol)} and must be {_PROTOCOL}. Load it with torch and save it again."
        )
    vm.load()  # about the machine; torch wrote little-endian numbers in this format whatever it says
    claimed: dict[str, Storage] = {}

    def load_persistent(identifier: object) -> Storage:
        storage = _storage(file, identifier, 6)
        known = claimed.setdefault(storage.key, storage)
        if (known.dtype, known.size) != (storage.dtype, storage.size):
            file.refuse(f"its storage {shorten(storage.key)} has two types or sizes. Download it again.")
        return storage

    value = vm.load(GLOBALS, load_persistent)
    keys = vm.load()
    if not is_list(keys):
        vm.damaged("the list of storages is missing")
    starts: dict[str, int] = {}
    position = vm.position
    for key in keys:
        name = key if type(key) is str else ""
        storage = claimed.get(name)
        if storage is None or name in starts:
            file.refuse(
                f"its list of storages has {shorten(key)}, unknown to its pickle or repeated. Download it again."
            )
        nbytes = storage.size * storage.dtype.itemsize
        size = int.from_bytes(file.bytes(position, position + 8), "little")
        starts[name] = position + 8
        position += 8 + nbytes
        if size != storage.size or position > len(file):
            file.refuse(
                f"its storage {shorten(key)} has {size:,} elements in a file of {len(file):,} bytes, but its pickle"
                f" claims {storage.size:,}: it is truncated or damaged. Download it again."
            )

    def place(storage: Storage) -> tuple[int, int]:
        if storage.key not in starts:
            file.refuse(f"the storage {shorten(storage.key)} that a tensor needs is missing. Download it again.")
        first, count = storage.view or (0, storage.size)
        if first + count > storage.size:
            file.refuse(f"a view of its storage {shorten(storage.key)} reaches beyond it. Download it again.")
        return starts[storage.key] + first * storage.dtype.itemsize, count

    return _Result(file, place, swap=False).plain(value)


def _storage(file: MappedFile, identifier: object, length: int) -> Storage:
    """The storage that a persistent id names: ("storage", type, key, location, elements[, view])."""
    if is_tuple(identifier) and len(identifier) == length and identifier[0] == "storage":
        kind, key, location, size = identifier[1:5]
        claim = identifier[5] if length == 6 else None
        view: tuple[int, int] | None = None
        if is_tuple(claim) and len(claim) == 3 and is_count(claim[1]) and is_count(claim[2]):
            view = (claim[1], claim[2])
        elif claim is not None:
            kind = None
        if type(kind) is Global and kind.name in STORAGES and type(key) is str and is_count(size):
            if location == "meta":
                file.refuse("it holds tensors on the device 'meta', which have no values. Save the real ones.")
            return Storage(key, STORAGES[kind.name], size, view, kind.name != UNTYPED)
    file.refuse("its pickle has a persistent id that is not a storage's. Save only a state_dict().")


@dataclass(frozen=True, slots=True)
class _Part:
    """A value in plain types, how many values a walk over it meets, and how many containers deep it is."""

    value: object
    count: int
    height: int


_TOO_DEEP = _Part(None, 1, MAX_DEPTH + 1)


def _is_set(value: object) -> TypeGuard[Set[Hashable]]:
    return isinstance(value, set | frozenset)


class _Result:
    """Turns what the interpreter built into plain values, checking each tensor against the file.

    Args:
        file: where the storages are.
        place: the position in bytes and the number of elements of a storage.
        swap: storages have the other byte order.
    """

    def __init__(self, file: MappedFile, place: _Place, swap: bool):
        self._file = file
        self._place = place
        self._swap = swap
        self._done: dict[int, _Part | None] = {}

    def plain(self, value: object) -> object:
        return self._convert(value).value

    def _convert(self, value: object, depth: int = 0) -> "_Part":
        if isinstance(value, str | bytes | bytearray | int | float | complex | None):
            return _Part(value, 1, 0)
        # Each object is converted once, so that lists of lists of one list cost nothing here.
        if id(value) not in self._done:
            self._done[id(value)] = None
            self._done[id(value)] = self._convert_new(value, depth) if depth <= MAX_DEPTH else _TOO_DEEP
        part = self._done[id(value)]
        if part is None:
            self._file.refuse("one of its values contains itself, which no checkpoint needs.")
        if depth + part.height > MAX_DEPTH:
            self._file.refuse(f"its values are nested more than {MAX_DEPTH} deep, which no checkpoint needs.")
        if part.count > MAX_VALUES:
            self._file.refuse(
                f"its values repeat each other more than {MAX_VALUES:,} times, which no checkpoint needs."
            )
        return part

    def _convert_new(self, value: object, depth: int) -> "_Part":
        if type(value) is TensorRecord:
            return _Part(self._tensor(value), 1, 0)
        if type(value) is Global and value.value is not None and value.name not in STORAGES:
            return _Part(value.value, 1, 0)
        if _is_set(value):
            return _Part(value, 1 + len(value), 1)
        items = value.fields if isinstance(value, Record) else value
        if is_dict(items):
            parts = [self._convert(item, depth + 1) for item in items.values()]
            result = {key: part.value for key, part in zip(items, parts, strict=True)}
        elif is_list(items) or is_tuple(items):
            parts = [self._convert(item, depth + 1) for item in items]
            result = type(items)(part.value for part in parts)
        else:
            self._file.refuse(f"it holds {shorten(value)} as a value. Save only tensors and plain Python values.")
        height = 1 + max((part.height for part in parts), default=0)
        return _Part(result, 1 + sum(part.count for part in parts), height)

    def _tensor(self, record: TensorRecord) -> LazyTensor:
        start, size = self._place(record.storage)
        itemsize = record.dtype.itemsize
        available = size * record.storage.dtype.itemsize
        axes = list(zip(record.shape, record.stride, strict=True))
        last = record.offset + sum((n - 1) * stride for n, stride in axes)
        count = math.prod(record.shape)
        end = 0 if count == 0 else (last + 1) * itemsize
        if end > available:
            self._file.refuse(
                f"a tensor of shape {show(record.shape)}, stride {show(record.stride)} and offset {record.offset}"
                f" reaches {end:,} bytes into its storage {shorten(record.storage.key)} of {available:,}."
                " Download it again."
            )
        if math.prod(n or 1 for n in record.shape) * itemsize > max(available, MAX_REPEATED):
            self._file.refuse(
                f"a tensor of shape {show(record.shape)} repeats a storage of {available:,} bytes until it has"
                f" {count * itemsize:,}. Save it with .contiguous()."
            )
        finish = partial(_apply, record.conjugate, record.negate) if record.conjugate or record.negate else None
        # Along an axis of one element any stride is right, also one that is too large for NumPy.
        strides = tuple(stride * itemsize if n > 1 else itemsize for n, stride in axes)
        first = start + record.offset * itemsize
        swap = self._swap and itemsize > 1
        return lazy_tensor(self._file, first, record.shape, record.dtype, strides, swap=swap, finish=finish)


def _apply(conjugate: bool, negate: bool, values: np.ndarray) -> np.ndarray:
    values = np.conjugate(values) if conjugate else values
    return np.asarray(np.negative(values) if negate else values)
