"""read_torch_file on forged shapes and storages, on damaged archives, and on chance."""

import contextlib
import pathlib
import struct
import tracemalloc
import zipfile

import pytest
import torch_forge as forge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_forge import assert_refused, read_everything

from x2v_jax.checkpoint.files import pickle_reader, zip_index
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"


# Storages and shapes


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (b"NQ", "persistent id"),
        (b")Q", "persistent id"),
        (forge.text("storage") + b"Q", "persistent id"),
        (forge.storage("collections.OrderedDict"), "persistent id"),
        (forge.storage("torch.float32"), "persistent id"),
        (forge.storage(size=-1), "persistent id"),
        (forge.storage(size=2**63), "persistent id"),
        (forge.storage(key="1"), "missing"),
        (forge.storage(key="../data.pkl"), "missing"),
        (forge.storage(key="/etc/passwd"), "missing"),
        (forge.storage(size=5), "too few"),
        (forge.storage("torch.DoubleStorage"), "too few"),
        (forge.storage(location="meta"), "meta"),
        (forge.storage("torch.storage.UntypedStorage", size=16), "storage should be"),
        (forge.text("not a storage"), "storage should be"),
    ],
)
def test_forged_storages_are_refused(tmp_path, place, words):
    assert_refused(forge.zip_file(tmp_path / "a.pth", forge.state_dict(x=forge.tensor(place=place))), words)


@pytest.mark.parametrize(
    "claim",
    [
        {"shape": (5,)},
        {"shape": (2**62,)},
        {"shape": (2**40, 2**40), "stride": (0, 0)},
        {"shape": (2**31, 2**31, 2**31), "stride": (0, 0, 0)},
        {"shape": (0, 2**62, 2**62), "stride": (1, 1, 1)},
        {"shape": (4,), "offset": 1},
        {"shape": (1,), "offset": 4},
        {"shape": (1,), "offset": -1},
        {"shape": (1,), "offset": 2**62},
        {"shape": (2,), "stride": (-1,), "offset": 3},
        {"shape": (2,), "stride": (2**62,)},
        {"shape": (2,), "stride": (4,)},
        {"shape": (-1,)},
        {"shape": (2**63,)},
        {"shape": (2**200,)},
        {"shape": (2, 2)},
        {"shape": (1,) * 65, "stride": (1,) * 65},
        {"shape": ()},
    ],
)
def test_shapes_that_leave_their_storage_are_refused(tmp_path, claim):
    for path in forge.both_formats(tmp_path, forge.state_dict(x=forge.tensor(**claim))):
        assert_refused(path, "a tensor")


@pytest.mark.parametrize("part", [b"\x88", b"G?\xf0\0\0\0\0\0\0", forge.text("4"), b"N"])
def test_sizes_must_be_integers(tmp_path, part):
    pickled = forge.state_dict(x=forge.tensor()).replace(forge.tuple_of([forge.number(4)]), forge.tuple_of([part]))
    assert_refused(forge.zip_file(tmp_path / "a.pth", pickled), "a tensor")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"keys": ["1"]}, "unknown"),
        ({"keys": ["0", "0"]}, "repeated"),
        ({"keys": []}, "missing"),
        ({"keys": [1]}, "unknown"),
        ({"body": struct.pack("<q", -1) + forge.FOUR_FLOATS}, "claims 4"),
        ({"body": struct.pack("<q", 2**62) + forge.FOUR_FLOATS}, "claims 4"),
        ({"body": struct.pack("<q", 3) + forge.FOUR_FLOATS}, "claims 4"),
        ({"body": struct.pack("<q", 4) + forge.FOUR_FLOATS[:-1]}, "truncated"),
        ({"body": b"\x04"}, "truncated"),
    ],
)
def test_legacy_storages_must_be_there(tmp_path, data, words):
    path = tmp_path / "a.pth"
    path.write_bytes(forge.legacy_bytes(forge.state_dict(x=forge.tensor()), **data))
    assert_refused(path, words)


@pytest.mark.parametrize(
    "view",
    [
        forge.tuple_of([forge.text("v"), forge.number(3), forge.number(2)]),
        forge.tuple_of([forge.text("v"), forge.number(-1), forge.number(2)]),
        forge.tuple_of([forge.text("v")]),
        forge.text("v"),
    ],
)
def test_legacy_views_must_lie_in_their_storage(tmp_path, view):
    pickled = forge.state_dict(x=forge.tensor((2,), place=forge.storage(view=view)))
    assert_refused(forge.legacy_file(tmp_path / "a.pth", pickled), "view|persistent id")


# Archives


def good() -> dict[str, bytes]:
    return forge.members(forge.state_dict(x=forge.tensor()))


def write(path: pathlib.Path, raw: bytes) -> pathlib.Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "archive/../../evil", "/etc/passwd", "archive//x", "a\\b", "archive/./x", "archive/folder/"]
)
def test_member_names_that_are_no_plain_paths_are_refused(tmp_path, name):
    path = write(tmp_path / "a.pth", forge.archive({**good(), name: b"x"}))
    assert_refused(path, "not a plain relative path")
    assert sorted(tmp_path.iterdir()) == [path]


def test_zip_bombs_are_refused_without_unpacking(tmp_path):
    bomb = forge.archive({**good(), "archive/data/0": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    tracemalloc.start()
    assert_refused(write(tmp_path / "a.pth", bomb), "compressed")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        for name, raw in [*good().items(), ("archive/data/0", b"other")]:
            file.writestr(name, raw)
    assert_refused(tmp_path / "a.pth", "'archive/data/0' twice")


def patched(find: bytes, change: bytes, at: int = 0, which: int = 0) -> bytes:
    """A good archive with the bytes `change` put `at` bytes behind the `which`-th occurrence of `find`."""
    raw = bytearray(forge.archive(good()))
    position = -1
    for _ in range(which + 1):
        position = raw.index(find, position + 1)
    raw[position + at : position + at + len(change)] = change
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (patched(b"PK\1\2", b"\x01", 8), "encrypted"),
        (patched(b"PK\3\4", b"\x01", 6), "contradicts"),
        (patched(b"PK\3\4", b"\x08", 8), "contradicts"),
        (patched(b"PK\3\4", b"X", 30), "contradicts"),
        (patched(b"PK\3\4", b"XX"), "does not begin"),
        (patched(b"PK\1\2", b"\xff\xff\xff\x7f", 42), "damaged|ends outside"),
        (patched(b"PK\1\2", b"\xff\xff\xff\x7f\xff\xff\xff\x7f", 20), "ends outside"),
        (patched(b"PK\1\2", b"\xff\xff\xff\xff\xff\xff\xff\xff", 20), "ends outside"),
        (patched(b"PK\1\2", b"\xff", 24), "compressed"),
        (patched(b"PK\1\2", b"\xff\xff", 28), "damaged|UTF-8|contradicts|plain"),
        (patched(b"PK\1\2", b"\x01", 34), "damaged"),
        (patched(b"PK\1\2", b"\xff", 46), "UTF-8"),
        (patched(b"PK\5\6", b"\xff\xff", 10), "split|truncated"),
        (patched(b"PK\5\6", b"\xff\xff\xff\xff", 12), "truncated"),
        (patched(b"PK\5\6", b"\x00\x00\x00\x00", 16), "truncated"),
        (patched(b"PK\5\6", b"\x01", 4), "split"),
        (patched(b"PK\5\6", b"\x01", 20), "truncated"),
        (forge.archive(good()) + b"trailing", "truncated"),
        (forge.archive(good())[:-1], "truncated"),
        (forge.archive(good())[:-30], "truncated"),
        (b"PK\3\4", "truncated"),
        (forge.archive({}), "no|without"),
        (forge.archive({"archive/version": b"3"}), "data.pkl"),
        (forge.archive({**good(), "other/data.pkl": b"."}), "data.pkl"),
        (forge.archive({**good(), "archive/byteorder": b"middle"}), "byteorder"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, raw, words):
    assert_refused(write(tmp_path / "a.pth", raw), words)


def test_overlapping_members_are_refused(tmp_path):
    """Two entries of the list that share one member's bytes, as in archives that unpack to petabytes."""
    contents = good() | {"archive/data/1": forge.FOUR_FLOATS}
    raw = bytearray(forge.archive(contents))
    first = raw.index(b"archive/data/0", raw.index(b"PK\1\2")) - 46
    second = raw.index(b"archive/data/1", first) - 46
    inner = raw.index(b"PK\3\4", raw.index(b"archive/data/0"))
    # The data of member 0 is made to reach over the header and the data of member 1.
    (begin,) = struct.unpack_from("<L", raw, first + 42)
    length = inner + 30 + len("archive/data/1") + 16 - (begin + 30 + len("archive/data/0"))
    raw[first + 20 : first + 28] = struct.pack("<2L", length, length)
    assert second > first
    assert_refused(write(tmp_path / "a.pth", bytes(raw)), "overlaps")


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_index, "MAX_MEMBERS", 3)
    assert_refused(write(tmp_path / "a.pth", forge.archive(good())), "lists 4 members")


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    for name in ("state_dict.pth", "legacy.pth"):
        raw = (DATA / name).read_bytes()
        for length in range(0, len(raw), 7):
            assert_refused(write(tmp_path / "a.pth", raw[:length]))


# Chance


@pytest.mark.parametrize("name", ["state_dict", "parameters", "legacy", "dtypes"])
def test_mutated_files_are_read_or_refused(tmp_path_factory, name):
    original = (DATA / f"{name}.pth").read_bytes()
    path = tmp_path_factory.mktemp("fuzz") / "a.pth"
    mutation = st.tuples(st.integers(0, len(original) - 1), st.integers(0, 255))

    @settings(max_examples=120, derandomize=True)
    @given(st.lists(mutation, min_size=1, max_size=4), st.integers(0, len(original)))
    def check(mutations, length):
        raw = bytearray(original)
        for position, value in mutations:
            raw[position] = value
        path.write_bytes(raw if length % 4 else raw[:length])
        with contextlib.suppress(UserError):
            read_everything(read_torch_file(path))

    check()


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.sampled_from(sorted(pickle_reader._OPCODES)), max_size=30), st.binary(max_size=20))
def test_any_run_of_opcodes_is_read_or_refused(tmp_path_factory, opcodes, arguments):
    pickled = b"\x80\x02" + bytes(opcodes) + arguments + b"."
    path = forge.zip_file(tmp_path_factory.getbasetemp() / "opcodes.pth", pickled)
    with contextlib.suppress(UserError):
        read_everything(read_torch_file(path))
