"""read_torch_file on pickles that were made to do harm: each is refused with a sentence, and nothing runs."""

import builtins
import collections
import copyreg
import os
import pickle
import sys
import time
import tracemalloc

import pytest
import torch_forge as forge
from torch_forge import assert_refused

from x2v_jax.checkpoint.files import pickle_reader, torch_reader
from x2v_jax.checkpoint.files.torch_reader import read_torch_file


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("system", lambda canary: Calls(os.system, f"touch {canary}")),
        ("eval", lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')")),
        ("exec", lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')")),
        ("open", lambda canary: Calls(open, str(canary), "w")),
        ("getattr", lambda canary: Calls(getattr, "x", "upper")),
        ("import", lambda canary: Calls(__import__, "this")),
        ("system", lambda canary: {"weight": [Calls(list, [Calls(os.system, f"touch {canary}")])]}),
        ("system", lambda canary: Calls(collections.OrderedDict, [["key", Calls(os.system, f"touch {canary}")]])),
    ],
)
def test_calls_are_refused_by_name(tmp_path, protocol, name, attack):
    canary = tmp_path / "canary"
    pickled = pickle.dumps(attack(canary), protocol)
    for path in (forge.zip_file(tmp_path / "a.pth", pickled), forge.legacy_file(tmp_path / "b.pth", pickled)):
        # Protocols 0 and 1, which torch does not write, fail at their opcodes; the others at the global.
        assert_refused(path, name if protocol >= 2 else "")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"cos\nsystem\n", "'os.system'"),
        (b"cposix\nsystem\n(X\x01\0\0\0atR", "'posix.system'"),
        (b"cbuiltins\neval\n", "'builtins.eval'"),
        (b"ctorch\nload\n", "'torch.load'"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", "'torch._utils._rebuild_sparse_tensor'"),
        (b"ctorch._utils\n_rebuild_qtensor\n", "'torch._utils._rebuild_qtensor'"),
        (b"ctorch._utils\n_rebuild_wrapper_subclass\n", "'torch._utils._rebuild_wrapper_subclass'"),
        (b"ctorch\nQInt8Storage\n", "'torch.QInt8Storage'"),
        (b"ccopyreg\n_reconstructor\n", "'copyreg._reconstructor'"),
        (b"ccopyreg\nadd_extension\n", "'copyreg.add_extension'"),
        (b"ccollections\nOrderedDict.__init__.__globals__\n", "__globals__"),
        (b"ctorch._utils._rebuild_tensor_v2.__globals__\nget\n", "__globals__"),
        (b"\x8c\x02os\x8c\x06system\x93", "'os.system'"),
        (b"\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93", "OrderedDict.__class__"),
        (b"K\x01K\x02\x93", "not a string"),
        (b"(X\x01\0\0\0aios\nsystem\n", "'os.system'"),
        (b"(cos\nsystem\nX\x01\0\0\0ao", "'os.system'"),
        (b"(ccollections\nOrderedDict\no", "opcode OBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x83\x01\x00", "opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "opcode EXT4"),
        (b"Pcos\nsystem\n", "opcode PERSID"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"\xff", "opcode 0xff"),
    ],
)
def test_ways_to_a_global_are_refused(tmp_path, opcodes, words):
    for path in forge.both_formats(tmp_path, b"\x80\x02" + opcodes + b"."):
        assert_refused(path, words)


def test_an_extension_code_registered_in_this_process_is_not_used(tmp_path):
    copyreg.add_extension("os", "system", 77)
    try:
        assert_refused(forge.zip_file(tmp_path / "a.pth", b"\x80\x02\x82\x4d."), "EXT1")
    finally:
        copyreg.remove_extension("os", "system", 77)


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        # REDUCE and NEWOBJ on what is no function of ours
        (forge.text("os.system") + b")R", "calls 'os.system'"),
        (b"K\x01)\x81", "calls 1"),
        (forge.named("torch.FloatStorage") + b")R", "calls 'torch.FloatStorage'"),
        (forge.named("torch.float32") + b")\x81", "calls 'torch.float32'"),
        (forge.named("builtins.list") + b"](K\x01et\x85R", "missing|calls|damaged"),
        (forge.named("torch.Tensor") + b")\x81", "calls 'torch.Tensor'"),
        (forge.named("collections.OrderedDict") + b"]R", "calls"),
        (forge.named("collections.OrderedDict") + b")}\x92", "NEWOBJ_EX"),
        # BUILD on what is no dictionary and no record
        (forge.named("collections.OrderedDict") + b"}" + forge.text("x") + b"K\x01sb", "sets the state"),
        (forge.named("torch.Tensor") + b"}b", "sets the state"),
        (forge.tensor() + b"}" + forge.text("shape") + b"K\x01sb", "sets the state"),
        (b"]}b", "sets the state"),
        (b"}]b", "sets the state"),
        (b"}N}\x86b", "sets the state"),
        (forge.named("argparse.Namespace") + b")\x81}K\x01K\x02sN\x86b", "sets the state"),
        # arguments that the functions of torch never get
        (forge.call("torch._utils._rebuild_tensor_v2"), "_rebuild_tensor_v2"),
        (forge.call("torch._utils._rebuild_tensor_v3", *[b"N"] * 7), "_rebuild_tensor_v3"),
        (forge.call("torch._utils._rebuild_parameter", b"N", b"N", b"N"), "_rebuild_parameter"),
        (forge.call("torch._tensor._rebuild_from_type_v2", *[b"N"] * 4), "_rebuild_from_type_v2"),
        (forge.call("_codecs.encode", forge.text("a"), forge.text("rot13")), "_codecs.encode"),
        (forge.call("torch.device", forge.tensor()), "torch.device"),
        (forge.call("builtins.complex", b"K\x01", b"K\x01"), "builtins.complex"),
        (forge.call("pathlib.PosixPath", b"K\x01"), "pathlib"),
        (forge.call("argparse.Namespace", b"K\x01"), "Namespace"),
        # values that are not values
        (forge.named("collections.OrderedDict"), "as a value|unknown to its pickle"),
        (forge.storage(), "as a value"),
    ],
)
def test_stand_ins_do_only_what_they_are_for(tmp_path, opcodes, words):
    for path in forge.both_formats(tmp_path, b"\x80\x02" + opcodes + b"."):
        assert_refused(path, words)


def test_setting_state_changes_no_object_of_the_process(tmp_path):
    """`__dict__`, `__class__` and friends as state of the objects that may have one remain plain data."""
    state = b"}(" + b"".join(forge.text(n) + b"K\x01" for n in ("__class__", "__dict__", "fields", "update")) + b"u"
    pickled = forge.state_dict(
        a=forge.named("argparse.Namespace") + b")\x81" + state + b"b",
        b=forge.call("collections.OrderedDict") + state + b"b",
    )
    before = (dict(vars(pickle_reader.Record)), set(vars(builtins)))
    value = read_torch_file(forge.zip_file(tmp_path / "a.pth", pickled))
    assert type(value["a"]) is dict and type(value["b"]) is dict
    assert value == {"a": dict.fromkeys(("__class__", "__dict__", "fields", "update"), 1), "b": {}}
    assert before == (dict(vars(pickle_reader.Record)), set(vars(builtins)))


# Bombs


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02r\xff\xff\xff\x7f.", "missing"),
        (b"\x80\x02Nr\xff\xff\xff\x7f0j\xfe\xff\xff\x7f.", "memo"),
        (b"\x80\x02X\xff\xff\xff\x7fabc", "too early"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "too early"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "too early"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x00", "too early"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "integer"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer"),
        (b"\x80\x02]q\0h\0a.", "contains itself"),
        (b"\x80\x02}q\0" + forge.text("x") + b"h\0s.", "contains itself"),
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "nested"),
        (b"\x80\x02" + b"N" + b"\x85" * 100_000 + b".", "nested"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "missing|left over"),
        (b"\x80\x02](" + b"h\0" * 3 + b"e.", "memo"),
        (b"\x80\x02}(" + forge.text("x") + b"K\x01" + forge.text("x") + b"K\x02u.", "twice"),
        (b"\x80\x02}]K\x01s.", "dictionary key"),
        (b"\x80\x02}" + forge.number(2**70) + b"K\x01s.", "dictionary key"),
        (b"\x80\x02\x8f(]\x90.", "dictionary key"),
        (b"\x80\x02}(K\x01u.", "no value"),
        (b"\x80\x02NN.", "left over"),
        (b"\x80\x02.", "missing"),
        (b"\x80\x02a.", "missing"),
        (b"\x80\x02Na.", "list is missing"),
        (b"\x80\x02NK\x01K\x02s.", "dict is missing"),
        (b"\x80\x02\x87.", "missing"),
        (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
        (b"\x80\x09N.", "protocol"),
        (b"\x80\x02c" + b"a" * 2000, "no end"),
        (b"", "too early"),
    ],
)
def test_broken_and_explosive_pickles_are_refused(tmp_path, pickled, words):
    assert_refused(forge.zip_file(tmp_path / "a.pth", pickled), words)


def test_a_doubling_of_shared_lists_is_refused(tmp_path):
    """A "billion laughs": 40 lists that each hold the one before twice."""
    doubled = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(40))
    assert_refused(forge.zip_file(tmp_path / "a.pth", b"\x80\x02(]q\0" + doubled + b"l."), "repeat")


def test_a_staircase_of_shared_lists_is_refused(tmp_path):
    """Lists that are each shallow but stand on one another, met from the bottom up."""
    steps = b"".join(b"]h" + bytes([i]) + b"aq" + bytes([i + 1]) for i in range(200))
    assert_refused(forge.zip_file(tmp_path / "a.pth", b"\x80\x02(]q\0" + steps + b"l."), "nested")


@pytest.mark.parametrize("opcode", [b"]", b"}", b"\x8f", b"(", b"N", b"\x8a\x01a"])
def test_memory_of_a_pickle_is_bounded(tmp_path, monkeypatch, opcode):
    monkeypatch.setattr(pickle_reader, "MAX_OBJECTS", 20_000)
    path = forge.zip_file(tmp_path / "a.pth", b"\x80\x02" + opcode * 400_000)
    tracemalloc.start()
    assert_refused(path, "objects")
    assert tracemalloc.get_traced_memory()[1] < (8 << 20)
    tracemalloc.stop()


@pytest.mark.parametrize("copy", [b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R0", b"cbuiltins\nset\nh\1\x85R0"])
def test_copies_made_by_calls_count(tmp_path, monkeypatch, copy):
    monkeypatch.setattr(pickle_reader, "MAX_OBJECTS", 20_000)
    start = b"\x80\x02" + forge.text("x" * 100_000) + b"q\0](" + b"".join(map(forge.number, range(500))) + b"eq\x01"
    assert_refused(forge.zip_file(tmp_path / "a.pth", start + copy * 1000 + b"."), "objects")


def test_a_pickle_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_reader, "MAX_BYTES", 1000)
    monkeypatch.setattr(torch_reader, "MAX_BYTES", 1000)
    pickled = forge.state_dict(x=forge.text("y" * 2000))
    assert_refused(forge.zip_file(tmp_path / "a.pth", pickled), "which no checkpoint needs")
    monkeypatch.setattr(torch_reader, "MAX_BYTES", 10_000)
    assert_refused(forge.legacy_file(tmp_path / "b.pth", pickled), "longer than|too early")


def test_colliding_tuple_keys_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_reader, "MAX_TUPLE_KEYS", 10)
    items = b"".join(forge.number(i) + b"\x85N" for i in range(20))
    assert_refused(forge.zip_file(tmp_path / "a.pth", b"\x80\x02}(" + items + b"u."), "tuples as dictionary keys")


def test_long_names_do_not_fill_the_message(tmp_path):
    assert_refused(
        forge.zip_file(tmp_path / "a.pth", b"\x80\x02\x8c\x01aX\x40\x42\x0f\0" + b"b" * 1_000_000 + b"\x93.")
    )


@pytest.mark.usefixtures("without_type_checks")  # the reader is timed, not its checks
def test_refusals_are_quick(tmp_path):
    path = forge.zip_file(tmp_path / "a.pth", b"\x80\x02" + b"]" * 1_100_000)
    start = time.process_time()
    assert_refused(path, "objects")
    assert time.process_time() - start < 20
    assert "torch" not in sys.modules
