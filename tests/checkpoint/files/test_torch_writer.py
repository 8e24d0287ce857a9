"""write_torch_file: what comes back, the layout on disk, and files that are complete or absent.

That torch itself reads the result (weights_only=True, with and without mmap) was checked with torch 2.13; torch is no
dependency, so here the layout is held to what torch.save writes.
"""

import errno
import os
import pathlib
import pickletools
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from x2v_jax.checkpoint.files import atomic, torch_writer
from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.files.torch_globals import DTYPES
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.checkpoint.files.torch_writer import write_torch_file
from x2v_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    tensors = {name: (raw % 2 if name == "bool" else raw).view(dtype).reshape(2, -1) for name, dtype in DTYPES.items()}
    write_torch_file(tmp_path / "a.pth", tensors)
    result = read_torch_file(tmp_path / "a.pth")
    assert list(result) == list(tensors)
    for name, expected in tensors.items():
        assert result[name].dtype == expected.dtype and result[name].shape == expected.shape
        assert result[name].read().tobytes() == expected.tobytes()


@settings(max_examples=100, derandomize=True)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        hnp.arrays(
            st.sampled_from(["f4", "i8", "?", "u1", "c8"]), hnp.array_shapes(min_dims=0, min_side=0, max_dims=5)
        ),
        max_size=5,
    )
)
def test_any_state_dict_comes_back(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    write_torch_file(path, tensors)
    result = read_torch_file(path)
    assert list(result) == list(tensors)
    for name, expected in tensors.items():
        assert (result[name].dtype, result[name].shape) == (expected.dtype, expected.shape)
        assert result[name].read().tobytes() == expected.tobytes()


def test_views_lists_scalars_and_other_byte_orders_are_made_plain(tmp_path):
    tensors = {
        "view": np.arange(12).reshape(3, 4).T[::2],
        "repeated": np.broadcast_to(np.float32(2), (3, 2)),
        "list": [1.5, 2],
        "scalar": np.float16(3),
        "swapped": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 3), ml_dtypes.bfloat16),
    }
    write_torch_file(tmp_path / "a.pth", tensors)
    result = read_torch_file(tmp_path / "a.pth")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(result[name].read(), expected)
    assert result["none"].shape == (0, 3)


def test_lazy_tensors_stream_from_one_file_to_another(tmp_path):
    write_torch_file(tmp_path / "a.pth", read_safetensors(DATA / "dtypes.safetensors"))
    result = read_torch_file(tmp_path / "a.pth")
    for name, expected in read_torch_file(DATA / "dtypes.pth").items():
        assert result[name].read().tobytes() == expected.read().tobytes()


def test_the_archive_is_laid_out_as_torch_has_it(tmp_path):
    path = tmp_path / "a.pth"
    write_torch_file(path, {"w": np.ones((2, 3), np.float32), "b": np.ones(5, np.int8)})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [info.filename for info in archive.infolist()]
        assert names == [
            f"archive/{name}"
            for name in (
                "data.pkl",
                ".format_version",
                ".storage_alignment",
                "byteorder",
                "data/0",
                "data/1",
                "version",
            )
        ]
        assert archive.read("archive/byteorder") == sys.byteorder.encode()
        assert archive.read("archive/version") == b"3\n"
        globals_named = {
            arg for op, arg, _ in pickletools.genops(archive.read("archive/data.pkl")) if op.name == "GLOBAL"
        }
        assert globals_named == {
            "torch._utils _rebuild_tensor_v2",
            "torch FloatStorage",
            "torch CharStorage",
            "collections OrderedDict",
        }
        raw = path.read_bytes()
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<2H", raw, info.header_offset + 26)
            assert (info.header_offset + 30 + name_length + extra_length) % 64 == 0
            assert info.compress_type == zipfile.ZIP_STORED


def test_sizes_beyond_32_bits_use_zip64(tmp_path, monkeypatch):
    """With the limit lowered to 100 bytes, sizes and positions above it go to the zip64 fields."""
    monkeypatch.setattr(torch_writer, "_WIDE", 100)
    monkeypatch.setattr("x2v_jax.checkpoint.files.zip_index._IN_ZIP64_FIELD", 100)
    tensors = {"large": np.arange(1000.0), "small": np.arange(3.0)}
    write_torch_file(tmp_path / "a.pth", tensors)
    result = read_torch_file(tmp_path / "a.pth")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(result[name].read(), expected)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x": np.array(["text"])}, "'x' has dtype"),
        ({"x": np.array([object()])}, "'x' has dtype"),
        ({"x": np.zeros(2, ml_dtypes.int4)}, "'x' has dtype int4"),
        ({"x": np.zeros(2, np.longdouble)}, "'x' has dtype"),
        ({3: np.zeros(2)}, "must be a string"),
    ],
)
def test_what_torch_does_not_have_is_refused(tmp_path, tensors, words):
    with pytest.raises(UserError, match=words):
        write_torch_file(tmp_path / "a.pth", tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write_torch_file(path, {"old": np.zeros(1)})
    before = path.read_bytes()

    def full(descriptor, data, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left on device.*full"):
        write_torch_file(path, {"new": np.zeros(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    usage = atomic.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* bytes and the disk has 1,000 free"):
        write_torch_file(tmp_path / "a.pth", {"x": np.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/a.pth", "folder", "n" * 300, ""])
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_torch_file(place, {"x": np.zeros(1)})
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_an_error_while_reading_a_source_is_not_blamed_on_the_target(tmp_path):
    class Gone:
        shape, dtype, nbytes, size = (1,), np.dtype(np.float32), 4, 1

        def __array__(self, dtype=None, copy=None):
            raise OSError(errno.EIO, "source is gone")

    with pytest.raises(OSError, match="source is gone"):
        write_torch_file(tmp_path / "a.pth", {"x": Gone()})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = """
        import sys, numpy as np
        from x2v_jax.checkpoint.files.torch_writer import write_torch_file

        class Waits:
            shape, dtype, nbytes, size = (1,), np.dtype(np.float32), 4, 1
            def __array__(self, dtype=None, copy=None):
                print("half", flush=True)
                sys.stdin.read()

        write_torch_file(sys.argv[1], {"first": np.zeros(1000), "second": Waits()})
    """
    path = tmp_path / "a.pth"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        with pytest.raises(UserError, match="another process is writing"):
            write_torch_file(path, {"x": np.zeros(1)})
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    write_torch_file(path, {"x": np.zeros(1)})
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_torch_file(path)) == ["x"]
