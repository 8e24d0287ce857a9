"""A pickle interpreter that builds plain values and calls nothing but the functions it is given.

Why not `pickle.Unpickler` with a restricted `find_class`: what `find_class` returns is then called, instantiated and
given attributes by C code (REDUCE, NEWOBJ, BUILD, the extension registry), so safety rests on the behaviour of every
class that is let through, and a few bytes (a memo index of 2**31, say) make it allocate gigabytes before any hook runs.
Here an opcode that is not written below does not exist, a global is an inert `Global` record that only this file knows
how to call, no attribute is ever set on anything, and memory is bounded by a budget. A checkpoint has some 50 opcodes
a tensor, so speed is no concern.
"""

# The table of opcodes at the end is a part of the interpreter that stands outside its class.
# pyright: reportPrivateUsage=false

import pickletools
import struct
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn, TypeGuard

MAX_BYTES = 64 << 20  # of one pickle; a checkpoint of 10,000 tensors has about 2 MB
MAX_OBJECTS = 1_000_000  # made by one pickle, each some 64 to 250 bytes in memory; 10,000 tensors make 700,000
MAX_INT_BYTES = 32
MAX_TUPLE_KEYS = 4096
MAX_TUPLE_KEY_LENGTH = 16

_SCALARS = (str, bytes, int, float, bool, type(None))


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """What stands on the stack for a module's global: a name, and what to do when the pickle calls it.

    Attributes:
        name: the dotted name in the pickle.
        call: makes the value from the interpreter and the arguments; None where the pickle may not call it.
        value: what it stands for when it is used as a value, such as a dtype.
    """

    name: str
    call: "Callable[[Interpreter, tuple[object, ...]], object] | None" = None
    value: object = None


@dataclass(slots=True, eq=False)
class Record:
    """An object with attributes, such as an argparse.Namespace, reduced to a dictionary of them."""

    fields: dict[Hashable, object] = field(default_factory=dict[Hashable, object])


class Interpreter:
    """Runs one pickle after another out of a buffer.

    Args:
        data: the bytes; one pickle may take `MAX_BYTES` of them.
        refuse: called with a reason to raise the error that names the file.
    """

    def __init__(self, data: bytes, refuse: Callable[[str], NoReturn]):
        self.data = data
        self.position = 0
        self.refuse = refuse

    def load(
        self,
        global_table: Mapping[str, Global] = MappingProxyType({}),
        load_persistent: Callable[[object], object] | None = None,
    ) -> object:
        """The value of the pickle at `position`, which moves behind it.

        Args:
            global_table: the globals that it may name, by dotted name.
            load_persistent: makes the value for a persistent id.
        """
        self._global_table = global_table
        self._load_persistent = load_persistent
        self._limit = min(len(self.data), self.position + MAX_BYTES)
        self._budget = MAX_OBJECTS
        self._tuple_keys = 0
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        while (opcode := self._take(1)[0]) != _STOP:
            self.charge(1)
            run = _OPCODES.get(opcode)
            if run is None:
                name = next((known.name for known in pickletools.opcodes if ord(known.code) == opcode), hex(opcode))
                self.refuse(f"its pickle has opcode {name}, which no checkpoint needs; nothing was executed.")
            run(self)
        value = self._pop()
        if self._stack or self._marks:
            self.damaged("values are left over at its end")
        return value

    def damaged(self, what: str) -> NoReturn:
        """Raise the error for a pickle that no pickler writes."""
        self.refuse(f"its pickle is damaged ({what}). Download the file again.")

    def charge(self, objects: int) -> None:
        """Count `objects` (about 64 bytes each) towards what one pickle may make."""
        self._budget -= objects
        if self._budget < 0:
            self.refuse(f"its pickle makes more than {MAX_OBJECTS:,} objects, which no checkpoint needs.")

    def set_item(self, target: dict[Hashable, object], key: object, value: object) -> None:
        """target[key] = value, for keys whose hashes an attacker cannot make collide, once each."""
        if self.key(key) in target:
            self.damaged(f"the key {shorten(key)} occurs twice")
        target[key] = value

    def key(self, key: object) -> Hashable:
        """`key`, checked to be a plain value. Strings hash with a secret seed; numbers are bounded; tuples are few."""
        if is_tuple(key) and len(key) <= MAX_TUPLE_KEY_LENGTH and all(type(part) in _SCALARS for part in key):
            self._tuple_keys += 1
            if self._tuple_keys > MAX_TUPLE_KEYS:
                self.refuse(f"it has more than {MAX_TUPLE_KEYS} tuples as dictionary keys, which no checkpoint needs.")
        elif type(key) not in _SCALARS or (type(key) is int and key.bit_length() > 64):
            self.refuse(f"it uses {shorten(key)} as a dictionary key; checkpoints have names or small numbers there.")
        return key

    # Bytes

    def _take(self, count: int) -> bytes:
        start, stop = self.position, self.position + count
        if stop > self._limit:
            if stop > len(self.data):
                self.damaged("it ends too early")
            self.refuse(f"its pickle is longer than {MAX_BYTES >> 20} MiB, which no checkpoint needs.")
        self.position = stop
        return self.data[start:stop]

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, min(self._limit, self.position + 1024))
        if end < 0:
            self.damaged("a global's name has no end")
        text = self._decode(self._take(end - self.position))
        self.position += 1
        return text

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.damaged("a string is not UTF-8")

    # Stack

    def _pop(self) -> object:
        if not self._stack:
            self.damaged("a value is missing")
        return self._stack.pop()

    def _top[T](self, is_kind: Callable[[object], TypeGuard[T]], kind: str) -> T:
        top = self._stack[-1] if self._stack else None
        if not is_kind(top):
            self.damaged(f"a {kind} is missing")
        return top

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            self.damaged("a mark is missing")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])))

    def _pair(self) -> list[object]:
        value = self._pop()
        return [self._pop(), value]

    # Opcodes with more to them than a push

    def _protocol(self) -> None:
        if (version := self._unsigned(1)) > 5:
            self.damaged(f"protocol {version}")

    def _integer(self, width: int) -> None:
        if width > MAX_INT_BYTES:
            self.refuse(f"its pickle has an integer of {width} bytes, which no checkpoint needs.")
        self._push(int.from_bytes(self._take(width), "little", signed=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._pop()
        self._push(self._memo[index])

    def _get(self, index: int) -> None:
        if index not in self._memo:
            self.damaged(f"memo {index} is empty")
        self._push(self._memo[index])

    def _extend(self, items: list[object]) -> None:
        self._top(is_list, "list").extend(items)

    def _fill_dict(self, items: list[object]) -> None:
        target = self._top(is_dict, "dict")
        if len(items) % 2:
            self.damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.set_item(target, key, value)

    def _new_dict(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._fill_dict(items)

    def _global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            self.damaged("a global's name is not a string")
        dotted = f"{module}.{name}"
        found = self._global_table.get(dotted)
        if found is None:
            self._refuse_global(dotted)
        self._push(found)

    def _refuse_global(self, name: str) -> NoReturn:
        self.refuse(
            f"it asks for the global {shorten(name)}, which a file of tensors does not need; nothing was executed."
            " Use a safetensors file from a source that you trust, or save only a state_dict()."
        )

    def _call(self) -> None:
        function, arguments = self._pair()
        if type(function) is not Global or function.call is None or not is_tuple(arguments):
            name = function.name if type(function) is Global else function
            self.refuse(f"its pickle calls {shorten(name)} with {shorten(arguments)}, and nothing was executed.")
        self._push(function.call(self, arguments))

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1] if self._stack else None
        if not is_dict(state) or type(target) not in (dict, Record):
            self.refuse(f"its pickle sets the state of {shorten(target)}, which no checkpoint needs.")
        # A state_dict's only attribute is `_metadata`, versions of modules that say nothing about the tensors.
        if type(target) is Record:
            for key, value in state.items():
                self.set_item(target.fields, key, value)

    def _persistent(self) -> None:
        if self._load_persistent is None:
            self.refuse("its pickle refers to a storage in a place where none may be.")
        self._push(self._load_persistent(self._pop()))

    def _fill_set(self) -> None:
        items = self._pop_mark()
        self._top(is_set, "set").update(map(self.key, items))


# Of what a pickle made, by exact type: `isinstance` would let subclasses pass.


def is_list(value: object) -> TypeGuard[list[object]]:
    return type(value) is list


def is_tuple(value: object) -> TypeGuard[tuple[object, ...]]:
    return type(value) is tuple


def is_dict(value: object) -> TypeGuard[dict[Hashable, object]]:
    return type(value) is dict


def is_set(value: object) -> TypeGuard[set[Hashable]]:
    return type(value) is set


def shorten(value: object) -> str:
    """A one-line account of an untrusted value for an error message."""
    if isinstance(value, Global):
        value = value.name
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 120 else repr(value[:117]) + "..."
    if isinstance(value, int | float | None) and not (isinstance(value, int) and value.bit_length() > 256):
        return repr(value)
    if type(value).__module__.startswith("x2v_jax"):  # names of our own say nothing to a user
        return "a tensor" if hasattr(value, "shape") else "an object of torch's"
    return f"a {type(value).__name__}"


_STOP = ord(".")
_OPCODES: dict[int, Callable[[Interpreter], object]] = {
    # framing and stack
    0x80: Interpreter._protocol,
    0x95: lambda vm: vm._take(8),
    ord("("): Interpreter._mark,
    ord("0"): lambda vm: vm._pop(),
    ord("1"): lambda vm: vm._pop_mark(),
    # plain values
    ord("N"): lambda vm: vm._push(None),
    0x88: lambda vm: vm._push(True),
    0x89: lambda vm: vm._push(False),
    ord("J"): lambda vm: vm._integer(4),
    ord("K"): lambda vm: vm._push(vm._unsigned(1)),
    ord("M"): lambda vm: vm._push(vm._unsigned(2)),
    0x8A: lambda vm: vm._integer(vm._unsigned(1)),
    0x8B: lambda vm: vm._integer(vm._unsigned(4)),
    ord("G"): lambda vm: vm._push(struct.unpack(">d", vm._take(8))[0]),
    0x8C: lambda vm: vm._push(vm._decode(vm._take(vm._unsigned(1)))),
    ord("X"): lambda vm: vm._push(vm._decode(vm._take(vm._unsigned(4)))),
    0x8D: lambda vm: vm._push(vm._decode(vm._take(vm._unsigned(8)))),
    ord("U"): lambda vm: vm._push(vm._decode(vm._take(vm._unsigned(1)))),
    ord("T"): lambda vm: vm._push(vm._decode(vm._take(vm._unsigned(4)))),
    ord("C"): lambda vm: vm._push(vm._take(vm._unsigned(1))),
    ord("B"): lambda vm: vm._push(vm._take(vm._unsigned(4))),
    0x8E: lambda vm: vm._push(vm._take(vm._unsigned(8))),
    0x96: lambda vm: vm._push(bytearray(vm._take(vm._unsigned(8)))),
    # containers
    ord("]"): lambda vm: vm._push([]),
    ord("a"): lambda vm: vm._extend([vm._pop()]),
    ord("e"): lambda vm: vm._extend(vm._pop_mark()),
    ord("l"): lambda vm: vm._push(vm._pop_mark()),
    ord("}"): lambda vm: vm._push({}),
    ord("s"): lambda vm: vm._fill_dict(vm._pair()),
    ord("u"): lambda vm: vm._fill_dict(vm._pop_mark()),
    ord("d"): Interpreter._new_dict,
    ord(")"): lambda vm: vm._push(()),
    ord("t"): lambda vm: vm._push(tuple(vm._pop_mark())),
    0x85: lambda vm: vm._tuple(1),
    0x86: lambda vm: vm._tuple(2),
    0x87: lambda vm: vm._tuple(3),
    0x8F: lambda vm: vm._push(vm.charge(3) or set[object]()),  # an empty set is four times as large as an empty list
    0x90: Interpreter._fill_set,
    0x91: lambda vm: vm._push(frozenset(map(vm.key, vm._pop_mark()))),
    # memo
    ord("q"): lambda vm: vm._put(vm._unsigned(1)),
    ord("r"): lambda vm: vm._put(vm._unsigned(4)),
    0x94: lambda vm: vm._put(len(vm._memo)),
    ord("h"): lambda vm: vm._get(vm._unsigned(1)),
    ord("j"): lambda vm: vm._get(vm._unsigned(4)),
    # stand-ins for objects
    ord("c"): lambda vm: vm._global(vm._line(), vm._line()),
    0x93: lambda vm: vm._global(*vm._pair()),
    ord("i"): lambda vm: vm._refuse_global(f"{vm._line()}.{vm._line()}"),
    ord("R"): Interpreter._call,
    0x81: Interpreter._call,
    ord("b"): Interpreter._build,
    ord("Q"): Interpreter._persistent,
}
