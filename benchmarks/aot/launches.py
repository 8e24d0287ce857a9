"""How many kernels a compiled program launches, counted in its text: a loop's body counts as often as it runs."""

import collections
import functools
import re
from collections.abc import Mapping

# Instructions that no kernel is launched for: they name memory, or hand over to a computation that is counted itself.
_NO_LAUNCH = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "async-done", "async-update",
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# Before an instruction's name stands its type, in which no word is followed by a parenthesis.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


def count_launches(text: str) -> dict[str, int]:
    """Launches of a compiled program (`compiled.as_text()`) by kind: an HLO name, or a custom call's target.

    A loop whose number of rounds the compiler does not know counts once. Of a conditional all branches count.
    """
    computations, entry = _computations(text)

    @functools.cache
    def launches(name: str) -> Mapping[str, int]:
        counts: collections.Counter[str] = collections.Counter()
        for line in computations.get(name, ()):
            match = _INSTRUCTION.match(line)
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
