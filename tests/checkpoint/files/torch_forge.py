"""Builds files of torch.save byte by byte, right ones and wrong ones, for the tests of the reader."""

import io
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
FOUR_FLOATS = struct.pack("<4f", 0, 1, 2, 3)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def named(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def call(dotted: str, *arguments: bytes) -> bytes:
    return named(dotted) + tuple_of(arguments) + b"R"


def storage(
    kind: str = "torch.FloatStorage", key: str = "0", size: int = 4, view: bytes | None = None, location: str = "cpu"
) -> bytes:
    parts = [text("storage"), named(kind), text(key), text(location), number(size)]
    return tuple_of([*parts, view] if view is not None else parts) + b"Q"


def tensor(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    place: bytes | None = None,
    metadata: bytes | None = None,
) -> bytes:
    """The opcodes of one tensor of FOUR_FLOATS, or of whatever the arguments claim."""
    arguments = [
        storage() if place is None else place,
        number(offset),
        tuple_of(map(number, shape)),
        tuple_of(map(number, stride)),
        b"\x89",
        call("collections.OrderedDict"),
    ]
    return call("torch._utils._rebuild_tensor_v2", *arguments, *([] if metadata is None else [metadata]))


def state_dict(**values: bytes) -> bytes:
    items = b"".join(text(name) + value for name, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def members(data: bytes, **storages: bytes) -> dict[str, bytes]:
    """The members of an archive with the pickle `data` and the storages _0, _1, ..., by default FOUR_FLOATS."""
    storages = storages or {"_0": FOUR_FLOATS}
    return {
        "archive/data.pkl": data,
        "archive/byteorder": b"little",
        **{f"archive/data/{key[1:]}": raw for key, raw in storages.items()},
        "archive/version": b"3\n",
    }


def archive(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, raw in contents.items():
            file.writestr(zipfile.ZipInfo(name), raw, method)
    return buffer.getvalue()


def zip_file(path: pathlib.Path, data: bytes, **storages: bytes) -> pathlib.Path:
    path.write_bytes(archive(members(data, **storages)))
    return path


def legacy_bytes(
    data: bytes, keys: list | None = None, body: bytes | None = None, magic: int = MAGIC, protocol: int = 1001
) -> bytes:
    """The format before zip; by default with one storage "0" of FOUR_FLOATS."""
    data = re.sub(rb"(?<!t)tQ", rb"NtQ", data)  # here a persistent id ends with the view, or None
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(magic, 2), pickle.dumps(protocol, 2), pickle.dumps(info, 2), data]
    body = struct.pack("<q", 4) + FOUR_FLOATS if body is None else body
    return b"".join([*head, pickle.dumps(["0"] if keys is None else keys, 2), body])


def legacy_file(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.write_bytes(legacy_bytes(data))
    return path


def both_formats(folder: pathlib.Path, data: bytes) -> list[pathlib.Path]:
    """The same pickle in a zip and in a legacy file."""
    return [zip_file(folder / "new.pth", data), legacy_file(folder / "old.pth", data)]


def assert_refused(path: pathlib.Path, words: str = "") -> None:
    with pytest.raises(UserError, match=words or None) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def read_everything(value: Any) -> None:
    """Read all tensors of a result, as a program that converts it would."""
    if isinstance(value, LazyTensor):
        np.array(value.read())
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            read_everything(item)
