"""safetensors files: round trips with the reference library, bad headers by the dozen, and the streaming writer."""

import contextlib
import json
import pathlib
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from x2v_jax.checkpoint.files.safetensors import DTYPES, MAX_HEADER, SafetensorsWriter, read_metadata, read_safetensors
from x2v_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"
F32 = np.dtype(np.float32)


def save(path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> pathlib.Path:
    with SafetensorsWriter(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, metadata) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    return path


def forge(path: pathlib.Path, header: object, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    """A file with this header (an object or the raw bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_refused(path: pathlib.Path, words: str = "") -> None:
    with pytest.raises(UserError, match=words or None) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


# Round trips


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    tensors = {code: (raw % 2 if code == "BOOL" else raw).view(dtype).reshape(2, -1) for code, dtype in DTYPES.items()}
    result = read_safetensors(save(tmp_path / "a.safetensors", tensors))
    assert result.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert (result[name].dtype, result[name].shape) == (expected.dtype, expected.shape)
        assert result[name].read().tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["dtypes", "views", "state_dict"])
def test_files_of_the_reference_library_are_read(name):
    result = read_safetensors(DATA / f"{name}.safetensors")
    for key, expected in safetensors.deserialize((DATA / f"{name}.safetensors").read_bytes()):
        assert (result[key].dtype, result[key].shape) == (DTYPES[expected["dtype"]], tuple(expected["shape"]))
        assert result[key].read().tobytes() == bytes(expected["data"])


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
ARRAYS = hnp.arrays(
    st.sampled_from(["f8", "f4", "f2", "i8", "?", "u1", "u4"]), hnp.array_shapes(min_dims=0, min_side=0)
)


@settings(max_examples=100, derandomize=True)
@given(st.dictionaries(NAMES, ARRAYS, max_size=6), st.dictionaries(NAMES, st.text(max_size=20), max_size=3))
def test_both_libraries_read_what_either_writes(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    metadata = {key: value.encode(errors="replace").decode() for key, value in metadata.items()}
    save(path, tensors, metadata)
    assert read_metadata(path) == metadata
    theirs = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, metadata or None)
    ours = read_safetensors(path)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, expected in tensors.items():
        for values in (theirs[name], ours[name].read()):
            assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
            assert values.tobytes() == expected.tobytes()


def test_reading_is_lazy_and_gives_read_only_views(tmp_path):
    tensor = read_safetensors(save(tmp_path / "a.safetensors", {"x": np.arange(6.0).reshape(2, 3)}))["x"]
    values = tensor.read()
    assert not values.flags.owndata and not values.flags.writeable and values.flags.c_contiguous
    assert (tensor.ndim, tensor.size, tensor.nbytes) == (2, 6, 48)


def test_data_at_an_odd_position_is_read(tmp_path):
    header = json.dumps({"x": entry()}).encode()
    header += b" " * (1 - len(header) % 2)
    path = forge(tmp_path / "a.safetensors", header, np.float32([1, 2]).tobytes())
    values = read_safetensors(path)["x"].read()
    assert values.flags.aligned
    np.testing.assert_array_equal(values, np.float32([1, 2]))


def test_zero_sized_tensors_stand_anywhere_between_others(tmp_path):
    header = {
        "a": entry(),
        "b": entry("F32", (0, 4), (8, 8)),
        "c": entry("F32", (2,), (8, 16)),
        "d": entry("I8", (0,), (0, 0)),
    }
    result = read_safetensors(forge(tmp_path / "a.safetensors", header, bytes(16)))
    assert {name: tensor.read().shape for name, tensor in result.items()} == {
        "a": (2,),
        "b": (0, 4),
        "c": (2,),
        "d": (0,),
    }


# Bad headers


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "does not begin"),
        (b"[]", "does not begin"),
        (b" {}", "does not begin"),
        (b"{", "not JSON"),
        (b'{"a":NaN}', "just dtype"),
        (b'{"\xff":1}', "not JSON in UTF-8"),
        (b'{"\\ud800":1}', "not Unicode text"),
        (b'{"a":' + b"9" * 5000 + b"}", "too long"),
        (b'{"a":' * 50_000, "brackets|not JSON"),
        (b'{"a":' + b"[" * 50_000, "brackets|not JSON"),
        (b'{"a":1} {}', "not JSON"),
        (b'{"x":1,"x":1}', "'x' twice"),
        (b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "'dtype' twice"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": [1]}, "__metadata__"),
        ({"__metadata__": None}, "__metadata__"),
        ({"x": None}, "just dtype"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "just dtype"),
        ({"x": entry() | {"more": 1}}, "just dtype"),
        ({"x": entry("F31")}, "'F31'"),
        ({"x": entry("f32")}, "'f32'"),
        ({"x": entry(None)}, "None"),
        ({"x": entry(["F32"])}, "dtype"),
        ({"x": entry("F32", 2)}, "shape"),
        ({"x": entry("F32", [-2])}, "shape"),
        ({"x": entry("F32", [2.0])}, "shape"),
        ({"x": entry("F32", [True, True])}, "shape"),
        ({"x": entry("F32", ["2"])}, "shape"),
        ({"x": entry("F32", [2**64])}, "shape"),
        ({"x": entry("F32", [1] * 65, [0, 4])}, "shape"),
        ({"x": entry("F32", [2**62, 2**62, 4])}, "data_offsets"),
        ({"x": entry("F32", [2**32, 2**32])}, "data_offsets"),
        ({"x": entry("F32", [2**62, 2**62, 0], [0, 0])}, "data_offsets"),
        ({"x": entry("F32", [2], [0])}, "two positions"),
        ({"x": entry("F32", [2], [0, 8, 8])}, "two positions"),
        ({"x": entry("F32", [2], [-8, 0])}, "two positions"),
        ({"x": entry("F32", [2], [8, 0])}, "data_offsets"),
        ({"x": entry("F32", [2], [0.0, 8.0])}, "two positions"),
        ({"x": entry("F32", [2], [0, 7])}, "data_offsets"),
        ({"x": entry("F32", [3], [0, 12])}, "truncated"),
        ({"x": entry("F32", [2], [2**62, 2**62 + 8])}, "hole"),
        ({"x": entry("F32", [1], [4, 8])}, "hole of 4 bytes"),
        ({"x": entry("F32", [1], [0, 4])}, "belong to no tensor"),
        ({"x": entry(), "y": entry()}, "overlaps"),
        ({"x": entry(), "y": entry("F32", [1], [4, 8])}, "overlaps"),
        ({"x": entry("F32", [1], [0, 4]), "y": entry("F32", [0], [2, 2])}, "overlaps|hole"),
        ({}, "belong to no tensor"),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, words):
    assert_refused(forge(tmp_path / "a.safetensors", header, bytes(8)), words)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (100, "truncated"),
        (MAX_HEADER + 1, "is the most"),
        (2**63, "is the most"),
        (2**64 - 1, "is the most"),
        (0, "begin"),
    ],
)
def test_header_lengths_are_checked(tmp_path, length, words):
    assert_refused(forge(tmp_path / "a.safetensors", {"x": entry()}, length=length), words)


@pytest.mark.parametrize("content", [b"", b"\x01", b"PK\3\4" + bytes(20), b"\x80\x02}q" * 4])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert_refused(path)


def test_a_header_of_many_small_objects_takes_little_memory(tmp_path):
    path = forge(tmp_path / "a.safetensors", b'{"a":[' + b"{}," * 1_000_000 + b"{}]}")
    tracemalloc.start()
    assert_refused(path, "brackets")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_metadata_of_a_bad_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="__metadata__"):
        read_metadata(forge(tmp_path / "a.safetensors", {"__metadata__": {"a": None}}))
    assert read_metadata(DATA / "views.safetensors") == {}


def test_every_truncation_is_refused(tmp_path):
    raw = (DATA / "dtypes.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    for length in range(0, len(raw), 5):
        path.write_bytes(raw[:length])
        assert_refused(path)


def read_or_refuse(path: pathlib.Path) -> None:
    with contextlib.suppress(UserError):
        for tensor in read_safetensors(path).values():
            np.array(tensor.read())


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=5))
def test_mutated_files_are_read_or_refused(tmp_path_factory, mutations):
    raw = bytearray((DATA / "dtypes.safetensors").read_bytes())
    for position, value in mutations:
        raw[position % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    read_or_refuse(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPES)),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), values),
    max_leaves=10,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 2**65) | st.integers(0, 3), max_size=4),
        "data_offsets": st.lists(st.integers(0, 40) | st.integers(), max_size=3),
    }
)


@settings(max_examples=200, derandomize=True)
@given(st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=4), st.binary(max_size=40))
def test_random_headers_are_read_or_refused(tmp_path_factory, header, data):
    read_or_refuse(forge(tmp_path_factory.getbasetemp() / "random.safetensors", header, data))


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_safetensors(tmp_path / "a.safetensors")
