"""Reads the text of a compiled program: which arrays it makes, and how large they are."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
# These name arrays that others made. A `-start` gives its result when it is `-done`.
_MAKES_NOTHING = {"parameter", "get-tuple-element", "tuple", "while", "conditional", "bitcast", "call"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Made:
    """An array that one instruction of the program makes in memory.

    updates: whether the instruction writes into an array that is there already, and only a part of it.
    """

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    updates: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def arrays_made(text: str) -> list[Made]:
    """All arrays that a compiled program (`compiled.as_text()`) makes, without those that live within one fusion."""
    fused = set(re.findall(r"\bfusion\(.*?calls=%?([\w.\-]+)", text))
    roots = dict(_roots(text))
    made = []
    for computation, line in _instructions(text):
        match = _INSTRUCTION.match(line)
        if computation in fused or match is None:
            continue
        name, shapes, op = match.groups()
        if op in _MAKES_NOTHING or op.endswith("-start"):
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        root = roots.get(called.group(1), "") if called else op
        for dtype, dims in _ARRAY.findall(shapes):
            shape = tuple(int(n) for n in dims.split(",") if n)
            made.append(Made(name, op, dtype, shape, root == "dynamic-update-slice" or "dynamic-update-slice" in name))
    return made


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match.group(1)
        else:
            yield computation, line


def _roots(text: str) -> Iterator[tuple[str, str]]:
    for computation, line in _instructions(text):
        if line.lstrip().startswith("ROOT") and (match := _INSTRUCTION.match(line)):
            yield computation, match.group(3)
