"""Reads the text of a compiled program: which arrays it makes and how large they are, how many kernels it launches."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
# These name arrays that others made. A `-start` gives its result when it is `-done`.
_MAKES_NOTHING = {"parameter", "get-tuple-element", "tuple", "while", "conditional", "bitcast", "call"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
# Instructions that no kernel is launched for: they name memory, or hand over to a computation that is counted itself.
_NO_LAUNCH = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-done", "async-update",
}  # fmt: skip
# Before an instruction's name stands its type, in which no word is followed by a parenthesis.
_LAUNCHED = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


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
            computation = match.group(2)
        else:
            yield computation, line


def _roots(text: str) -> Iterator[tuple[str, str]]:
    for computation, line in _instructions(text):
        if line.lstrip().startswith("ROOT") and (match := _INSTRUCTION.match(line)):
            yield computation, match.group(3)


def count_launches(text: str) -> dict[str, int]:
    """Launches of a compiled program (`compiled.as_text()`) by kind: an HLO name, or a custom call's target.

    A loop's body counts as often as it runs, or once where the compiler does not know that. Of a conditional all
    branches count.
    """
    computations, entry = _computations(text)

    @functools.cache
    def launches(name: str) -> Mapping[str, int]:
        counts: collections.Counter[str] = collections.Counter()
        for line in computations.get(name, ()):
            match = _LAUNCHED.match(line)
            if match is None:
                continue
            op = match.group(1)
            times = 1
            if op == "while":
                trips = _TRIPS.search(line)
                times = int(trips.group(1)) if trips else 1
                callees = re.findall(r"body=%?([\w.\-]+)", line)
            elif op in ("call", "conditional", "call-start", "async-start"):
                callees = _callees(line)
            else:
                callees = []
                if op not in _NO_LAUNCH and not op.endswith("-done"):
                    target = _TARGET.search(line)
                    counts[target.group(1) if op == "custom-call" and target else op.removesuffix("-start")] += 1
            for callee in callees:
                for kind, number in launches(callee).items():
                    counts[kind] += times * number
        return counts

    return dict(sorted(launches(entry).items()))


def _callees(line: str) -> list[str]:
    found = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        found += [name.strip().lstrip("%") for name in group.split(",")]
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(2)
            computations[name] = []
            entry = name if match.group(1) else entry
        elif name:
            computations[name].append(line)
    return computations, entry
