"""SafetensorsWriter: streaming, misuse, and files that are complete or absent."""

import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_metadata, read_safetensors
from x2v_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"
F32 = np.dtype(np.float32)


def save(path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> pathlib.Path:
    with SafetensorsWriter(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, metadata) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    return path


def test_parts_are_written_in_any_order(tmp_path):
    stacked = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"blocks": (stacked.shape, stacked.dtype), "head": ((), F32)}) as writer:
        for index in (2, 0, 3):
            writer.write_part("blocks", index, stacked[index])
        writer.write("head", np.float32(7))
        writer.write_part("blocks", 1, stacked[1])
        assert not path.exists()
    result = read_safetensors(path)
    np.testing.assert_array_equal(result["blocks"].read(), stacked)
    assert result["head"].read() == 7


def test_lazy_tensors_and_views_are_written(tmp_path):
    source = read_safetensors(DATA / "views.safetensors")
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in source.items()}
    with SafetensorsWriter(tmp_path / "a.safetensors", specs | {"t": ((3, 2), F32)}, {"note": "ü"}) as writer:
        for name, tensor in source.items():
            writer.write(name, tensor)
        writer.write("t", np.arange(6, dtype=F32).reshape(2, 3).T)
    result = read_safetensors(tmp_path / "a.safetensors")
    for name, tensor in source.items():
        assert result[name].read().tobytes() == tensor.read().tobytes()
    np.testing.assert_array_equal(result["t"].read(), [[0, 3], [1, 4], [2, 5]])
    assert read_metadata(tmp_path / "a.safetensors") == {"note": "ü"}


def test_every_tensor_begins_at_a_multiple_of_its_element(tmp_path):
    tensors = {"a": np.zeros(3, np.int8), "b": np.zeros(1, np.float64), "c": np.zeros(1, ml_dtypes.bfloat16)}
    result = read_safetensors(save(tmp_path / "a.safetensors", tensors))
    assert all(not tensor.read().flags.owndata for tensor in result.values())


def unwritten(writer):
    writer.write("x", np.zeros((2, 3), F32))


def unwritten_part(writer):
    unwritten(writer)
    writer.write_part("y", 0, np.zeros(3, F32))


def twice(writer):
    unwritten(writer)
    unwritten(writer)


def part_twice(writer):
    writer.write_part("x", 1, np.zeros(3, F32))
    writer.write_part("x", 1, np.zeros(3, F32))


def part_after_whole(writer):
    unwritten(writer)
    writer.write_part("x", 0, np.zeros(3, F32))


def whole_after_part(writer):
    writer.write_part("x", 0, np.zeros(3, F32))
    unwritten(writer)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (unwritten, "not written: y"),
        (unwritten_part, "not written: y"),
        (twice, "'x' is written twice"),
        (part_twice, "part 1 of tensor 'x' is written twice"),
        (part_after_whole, "written twice"),
        (whole_after_part, "written twice"),
        (lambda writer: writer.write("z", np.zeros(1)), "'z' was not announced"),
        (lambda writer: writer.write("x", np.zeros((3, 2), F32)), r"shape \(2, 3\)"),
        (lambda writer: writer.write("x", np.zeros((2, 3))), "float32.*float64"),
        (lambda writer: writer.write_part("x", 2, np.zeros(3, F32)), "no part 2"),
        (lambda writer: writer.write_part("x", -1, np.zeros(3, F32)), "no part -1"),
        (lambda writer: writer.write_part("x", 0, np.zeros((1, 3), F32)), r"shape \(3,\)"),
    ],
)
def test_misuse_of_the_writer_raises_and_leaves_nothing(tmp_path, use, words):
    specs = {"x": ((2, 3), F32), "y": ((2, 3), F32)}
    with pytest.raises(ValueError, match=words), SafetensorsWriter(tmp_path / "a.safetensors", specs) as writer:
        use(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("specs", "metadata"),
    [
        ({"x": ((1,), np.dtype("U3"))}, {}),
        ({"x": ((1,), np.dtype(ml_dtypes.int4))}, {}),
        ({"__metadata__": ((1,), F32)}, {}),
        ({}, {"a": 1}),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_what_the_format_cannot_hold_is_refused(tmp_path, specs, metadata):
    with pytest.raises(ValueError, match=r"stored|strings"):
        SafetensorsWriter(tmp_path / "a.safetensors", specs, metadata)


def test_writing_outside_the_context_raises(tmp_path):
    with pytest.raises(ValueError, match="inside the context"):
        SafetensorsWriter(tmp_path / "a.safetensors", {"x": ((1,), F32)}).write("x", np.zeros(1, F32))


def test_an_error_in_the_body_leaves_the_older_file(tmp_path):
    path = save(tmp_path / "a.safetensors", {"old": np.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, {"x": ((1,), F32)}):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_full_disk_is_said_and_cleaned_up(tmp_path, monkeypatch, allowed):
    """The disk fills at the header (0 writes succeed) or at the first tensor (1)."""
    write, calls = os.pwrite, []

    def limited(descriptor, data, position):
        calls.append(position)
        if len(calls) > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(UserError, match=r"a\.safetensors.*No space left on device.*full"):
        save(tmp_path / "a.safetensors", {"x": np.zeros(10)})
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: write(descriptor, data[:7], position))
    path = save(tmp_path / "a.safetensors", {"x": np.arange(50.0)})
    np.testing.assert_array_equal(read_safetensors(path)["x"].read(), np.arange(50.0))


def run_writer(folder: pathlib.Path, body: str, **options) -> "subprocess.Popen[bytes]":
    """A process that writes folder/a.safetensors with tensors x (1 MB) and y, running `body` between them."""
    code = f"""
        import sys, numpy as np
        from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
        specs = {{name: ((250_000,), np.dtype(np.float32)) for name in "xy"}}
        with SafetensorsWriter(sys.argv[1], specs) as writer:
            writer.write("x", np.ones(250_000, np.float32))
            {body}
            writer.write("y", np.ones(250_000, np.float32))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder / "a.safetensors")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:os.fork")  # preexec_fn forks
def test_a_real_limit_on_the_size_of_files_is_reported(tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))

    with run_writer(tmp_path, "pass", preexec_fn=limit) as process:
        _, errors = process.communicate()
    assert b"UserError: cannot write" in errors and b"full" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    with run_writer(tmp_path, "print('half', flush=True); sys.stdin.read()") as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert [item.name for item in tmp_path.iterdir()] == [".a.safetensors.incomplete"]
    path = save(tmp_path / "a.safetensors", {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_safetensors(path)) == ["x"]
