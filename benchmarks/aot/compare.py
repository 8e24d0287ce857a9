"""Holds what was compiled against the committed table: one that changed is looked at before it is committed."""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.aot import compiler as aot_compiler

Row = Mapping[str, Any]


def compare(
    rows: Sequence[Row], committed: Sequence[Row], *, near: Mapping[str, float], same: Sequence[str] = ()
) -> list[str]:
    """Sentences that say what differs, none where nothing does.

    Args:
        rows, committed: of "case" and numbers.
        near: numbers that may differ by so large a share of the committed value.
        same: fields that must be equal. A field that is None or empty on one of the two sides is not compared: it could
            not be measured there.
    """
    found = []
    before = {row["case"]: row for row in committed}
    for row in rows:
        known = before.pop(row["case"], None)
        if known is None:
            found.append(f"{row['case']}: not in the committed table")
            continue
        for field in same:
            old, new = known.get(field), row.get(field)
            if old not in (None, {}, []) and new not in (None, {}, []) and old != new:
                found.append(f"{row['case']}: {field} was {old}, is {new}")
        for field, share in near.items():
            old, new = known.get(field), row.get(field)
            if old is not None and new is not None and abs(new - old) > share * abs(old):
                found.append(f"{row['case']}: {field} was {old:,}, is {new:,}")
    found += [f"{case}: in the committed table and not compiled" for case in before]
    return found


def spills(rows: Iterable[Row]) -> list[str]:
    """Sentences on kernels that keep registers in memory."""
    return [
        f"{row['case']}: {kernel['spill_bytes']} bytes of registers are spilled"
        for row in rows
        for kernel in row["kernels"]
        if kernel["spill_bytes"]
    ]


def versions() -> dict[str, str]:
    """Of everything that decides what a compiled program looks like."""
    names = ("jax", "jaxlib", "flax")
    found = {name: importlib.metadata.version(name) for name in names}
    ptxas = aot_compiler.find_tool("ptxas")
    if ptxas is not None:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
        found["ptxas"] = next((part[1:] for part in said.replace(",", " ").split() if part.startswith("V")), "unknown")
    return found


def parser(prog: str, description: str, table: pathlib.Path) -> argparse.ArgumentParser:
    """The options of both tables."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    made.add_argument("--wheels", type=pathlib.Path, help="folder that jax's two CUDA wheels are unpacked in")
    made.add_argument("--only", default="", help="cases whose name holds this; others stay as they are")
    made.add_argument("--write", action="store_true", help="put these numbers into the table")
    made.add_argument("--table", type=pathlib.Path, default=table, help="the committed table")
    return made


def run(
    options: argparse.Namespace,
    cases: Mapping[str, Any],
    measure: Callable[[aot_compiler.Compiler, Any], dict[str, Any]],
    line: Callable[[Row], str],
    judge: Callable[[Sequence[Row], Sequence[Row]], list[str]],
) -> int:
    """Compiles the cases, prints a line each, and compares with the table or writes it.

    Args:
        options: of `parser`.
        measure: one case's numbers.
        judge: (rows, committed rows) -> what is wrong.
    """
    tools = () if options.wheels is None else (options.wheels,)
    compiler = aot_compiler.Compiler(tools)
    table: Any = json.loads(options.table.read_text()) if options.table.exists() else {"cases": [], "versions": {}}
    chosen = [name for name in cases if options.only in name]
    if not chosen:
        print(f"--only {options.only}: no case has this in its name; there are {'; '.join(cases)}", file=sys.stderr)
        return 2
    rows, failed, now = [], [], versions()
    for name in chosen:
        try:
            rows.append({"case": name, **measure(compiler, cases[name])})
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")
            print(failed[-1], flush=True)
            continue
        print(line(rows[-1]), flush=True)
        if options.write:
            _write(options.table, merged(table["cases"], rows, list(cases)), now)
    known = (
        rows if options.write else [row for row in table["cases"] if row["case"] in chosen or row["case"] not in cases]
    )
    wrong = failed + judge(rows, known)
    if not options.write and wrong and table["versions"] != now:
        print(f"the table was made with {table['versions']}, this with {now}", file=sys.stderr)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


def merged(before: Sequence[Row], rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of a table in the order of `names`: new ones, and old ones of cases that were not compiled now."""
    found = {row["case"]: row for row in (*before, *rows)}
    return [found[name] for name in names if name in found]


def _write(path: pathlib.Path, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    record = {"target": "NVIDIA H200 (sm_90a), compiled without one", "versions": versions, "cases": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
