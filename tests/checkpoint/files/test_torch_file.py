"""read_torch_file on files that are right: values, dtypes, views, byte orders, both formats."""

import gc
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import psutil
import pytest
import safetensors
import torch_forge as forge

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import DTYPES
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"


def flat_sample(name: str) -> dict[str, LazyTensor]:
    """The tensors of a sample by the names that its safetensors twin has."""
    value = read_torch_file(DATA / f"{name}.pth")
    if name == "trainer":
        wrapped = value["generator_ema"]
        return {key.replace("model.", "").replace("_checkpoint_wrapped_module.", ""): x for key, x in wrapped.items()}
    return {key: x for key, x in value.items() if isinstance(x, LazyTensor)}


@pytest.mark.parametrize("name", ["state_dict", "dtypes", "views", "parameters", "trainer", "legacy"])
def test_samples_of_torch_equal_their_safetensors(name):
    ours, theirs = flat_sample(name), safetensors.deserialize((DATA / f"{name}.safetensors").read_bytes())
    assert ours.keys() == {key for key, _ in theirs}
    for key, expected in theirs:
        values = ours[key].read()
        assert (values.dtype, values.shape) == (DTYPES[expected["dtype"]], tuple(expected["shape"]))
        assert values.tobytes() == bytes(expected["data"])


def test_plain_values_beside_tensors_are_kept():
    value = read_torch_file(DATA / "parameters.pth")
    first, (second, *rest) = value["nested"]["x"]
    assert (first.shape, second.shape, rest) == ((2,), (1,), [3, "text", None, 1.5])
    assert read_torch_file(DATA / "trainer.pth")["step"] == 600


def test_values_that_trainers_keep_become_plain(tmp_path):
    path = forge.call("pathlib.PosixPath", forge.text("/"), forge.text("data"))
    settings = forge.named("argparse.Namespace") + b")\x81}" + forge.text("lr") + b"G?\xf0\0\0\0\0\0\0sb"
    pickled = forge.state_dict(
        dtype=forge.named("torch.bfloat16"),
        device=forge.call("torch.device", forge.text("cuda"), forge.number(1)),
        size=forge.call("torch.Size", forge.tuple_of([forge.number(2), forge.number(3)])),
        path=path,
        settings=settings,
        raw=forge.call("_codecs.encode", forge.text("\xff"), forge.text("latin1")),
        names=forge.call("__builtin__.set", b"](" + forge.text("a") + b"e"),
        lists=forge.call("collections.defaultdict", forge.named("builtins.list")),
        big=forge.number(2**100),
        pair=forge.call("collections.OrderedDict", b"](](" + forge.text("k") + b"Nee"),
    )
    assert read_torch_file(forge.zip_file(tmp_path / "a.pth", pickled)) == {
        "dtype": np.dtype(ml_dtypes.bfloat16),
        "device": "cuda:1",
        "size": (2, 3),
        "path": "/data",
        "settings": {"lr": 1.0},
        "raw": b"\xff",
        "names": {"a"},
        "lists": {},
        "big": 2**100,
        "pair": {"k": None},
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"shape": (2, 2), "stride": (1, 2)}, [[0, 2], [1, 3]]),
        ({"shape": (), "stride": (), "offset": 3}, 3),
        ({"shape": (2,), "stride": (0,), "offset": 1}, [1, 1]),
        ({"shape": (3, 2), "stride": (1, 1)}, [[0, 1], [1, 2], [2, 3]]),
        ({"shape": (1, 4), "stride": (2**62, 1)}, [[0, 1, 2, 3]]),
        ({"shape": (0, 3), "stride": (3, 1), "offset": 4}, np.zeros((0, 3))),
    ],
)
def test_views_of_a_storage(tmp_path, arguments, expected):
    for path in forge.both_formats(tmp_path, forge.state_dict(x=forge.tensor(**arguments))):
        np.testing.assert_array_equal(read_torch_file(path)["x"].read(), np.float32(expected))


def test_tensors_share_a_storage(tmp_path):
    pickled = forge.state_dict(whole=forge.tensor(), tail=forge.tensor((2,), (1,), 2))
    for path in forge.both_formats(tmp_path, pickled):
        value = read_torch_file(path)
        np.testing.assert_array_equal(value["whole"].read()[2:], value["tail"].read())


def test_legacy_storage_views(tmp_path):
    view = forge.tuple_of([forge.text("v"), forge.number(1), forge.number(2)])
    pickled = forge.state_dict(x=forge.tensor((2,), (1,), 0, forge.storage(view=view)))
    np.testing.assert_array_equal(read_torch_file(forge.legacy_file(tmp_path / "a.pth", pickled))["x"].read(), [1, 2])


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        ("torch.FloatStorage", np.array([1.5, -2], ">f4").tobytes(), np.float32([1.5, -2])),
        ("torch.ComplexFloatStorage", np.array([1 + 2j, 3], ">c8").tobytes(), np.complex64([1 + 2j, 3])),
        ("torch.BFloat16Storage", b"\x3f\x80\xc0\x00", np.array([1, -2], ml_dtypes.bfloat16)),
        ("torch.CharStorage", b"\x01\xff", np.int8([1, -1])),
    ],
)
def test_the_byteorder_member_is_honoured(tmp_path, kind, raw, expected):
    contents = forge.members(forge.state_dict(x=forge.tensor((2,), place=forge.storage(kind, size=2))), _0=raw)
    contents["archive/byteorder"] = b"big"
    path = tmp_path / "big.pth"
    path.write_bytes(forge.archive(contents))
    values = read_torch_file(path)["x"].read()
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == expected.dtype


def test_lazy_conjugation_and_negation(tmp_path):
    flags = b"}(" + forge.text("conj") + b"\x88" + forge.text("neg") + b"\x88u"
    place = forge.storage("torch.ComplexFloatStorage", size=2)
    pickled = forge.state_dict(x=forge.tensor((), (), 1, place, flags))
    path = forge.zip_file(tmp_path / "a.pth", pickled, _0=np.complex64([0, 1 + 2j]).tobytes())
    np.testing.assert_array_equal(read_torch_file(path)["x"].read(), np.complex64(-1 + 2j))


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path):
    call = forge.call
    hooks = call("collections.OrderedDict")
    attributes = b"}" + forge.text("tag") + b"K\x03s"
    inner = forge.tuple_of([forge.storage(), b"K\0", b"K\4\x85", b"K\1\x85", b"\x89", hooks])
    rebuild, kind = forge.named("torch._utils._rebuild_tensor_v2"), forge.named("torch.Tensor")
    pickled = forge.state_dict(
        parameter=call("torch._utils._rebuild_parameter", forge.tensor(), b"\x88", hooks),
        with_state=call("torch._utils._rebuild_parameter_with_state", forge.tensor(), b"\x88", hooks, attributes),
        subclass=call("torch._tensor._rebuild_from_type_v2", rebuild, kind, inner, attributes),
        first=call("torch._utils._rebuild_tensor", forge.storage(), b"K\0", b"K\4\x85", b"K\1\x85"),
    )
    for path in forge.both_formats(tmp_path, pickled):
        for tensor in read_torch_file(path).values():
            np.testing.assert_array_equal(tensor.read(), [0, 1, 2, 3])


def test_reading_gives_a_read_only_view_of_the_map():
    values = read_torch_file(DATA / "state_dict.pth")["a.weight"].read()
    assert not values.flags.writeable and not values.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_a_lazy_tensor_is_an_array_to_numpy():
    tensor = read_torch_file(DATA / "state_dict.pth")["a.weight"]
    assert (tensor.ndim, tensor.size, tensor.nbytes) == (2, 35, 140)
    assert np.asarray(tensor, np.float64).dtype == np.float64


def test_pages_leave_memory_with_the_last_view(tmp_path):
    size = 32 << 20
    place = forge.storage("torch.ByteStorage", size=size)
    path = forge.zip_file(tmp_path / "a.pth", forge.state_dict(x=forge.tensor((size,), place=place)), _0=bytes(size))
    tensor = read_torch_file(path)["x"]
    resident = psutil.Process().memory_info
    before = resident().rss
    view = tensor.read()[1:]
    assert view.max() == 0
    assert resident().rss - before > size // 2
    del view
    gc.collect()
    assert resident().rss - before < size // 4


def test_opening_reads_no_data(tmp_path):
    """A file of 8 GB that is a hole on disk: opened and its end read without touching the rest."""
    size = 8 << 30
    pickled = forge.state_dict(x=forge.tensor((size,), place=forge.storage("torch.ByteStorage", size=size)))
    head = forge.legacy_bytes(pickled, body=size.to_bytes(8, "little"))
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    tensor = read_torch_file(path)["x"]
    assert tensor.nbytes == size and tensor.read()[-1] == 0


@pytest.mark.parametrize("name", ["missing.pth", "folder", "pipe", "nul\0"])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot (open|read)"):
        read_torch_file(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
        (b"\x40\0\0\0\0\0\0\0{}", "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "does not begin"),
        (b"\x80\x04K\x01.", "magic number"),
        (forge.legacy_bytes(forge.state_dict(), protocol=1000), "protocol is 1000"),
    ],
)
def test_other_formats_are_told_apart(tmp_path, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_torch_file(path)


def test_the_reader_needs_neither_torch_nor_jax():
    code = "import sys, x2v_jax.checkpoint.files.torch_reader, x2v_jax.checkpoint.files.torch_writer; "
    code += "import x2v_jax.checkpoint.files.safetensors; print({'jax', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
