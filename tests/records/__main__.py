"""Records what the program does, and compares two records: for changes that move code and must not change behaviour.

    python tests/records record --checkout DIR OUT [--only help,configs] [--with-aot WHEELS]
    python tests/records compare OLD NEW [--only help,configs]

A record is a folder with one JSON file a section. DIR is any checkout of this project: it is asked only through its
command lines, in processes of their own, and through the few names in `inside.py`. `compare` exits with 1 where
something differs. Records are of one machine: frames and losses of another processor differ in their last digits.
"""

import argparse
import difflib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from checkout import Checkout
from sections import SECTIONS


def record(checkout: pathlib.Path, out: pathlib.Path, names: list[str], wheels: pathlib.Path | None) -> int:
    """Writes one file a section, anew after each slow item. A section that breaks off is a difference, too."""
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    began, broken = time.monotonic(), []
    for name in names:
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="x2v_records_") as folder:
            place = Checkout(checkout.resolve(), pathlib.Path(folder).resolve(), wheels)
            since = time.monotonic()
            try:
                for item, value in SECTIONS[name](place):
                    found[item] = value
                    seconds, since = time.monotonic() - since, time.monotonic()
                    print(f"{name:<12} {seconds:6.1f} s  {item}", flush=True)
                    if seconds > 1:
                        _write(out / f"{name}.json", {"commit": commit.stdout.strip(), "found": found})
            except RuntimeError as error:
                found["(broke off)"] = place.plain(str(error))
                broken.append(name)
                print(f"{name:<12} broke off: {error}", flush=True)
        _write(out / f"{name}.json", {"commit": commit.stdout.strip(), "found": found})
    print(f"{len(names)} sections in {time.monotonic() - began:.0f} s: {out}")
    return 1 if broken else 0


def compare(old: pathlib.Path, new: pathlib.Path, names: list[str]) -> int:
    """Prints what differs. A section that is in one record alone is told and not counted; so are new tests."""
    differs, compared = 0, 0
    for name in names:
        files = [folder / f"{name}.json" for folder in (old, new)]
        if not all(file.is_file() for file in files):
            if any(file.is_file() for file in files):
                print(f"{name}: in one of the records alone, not compared")
            continue
        before, after = (json.loads(file.read_text())["found"] for file in files)
        lines = list(_differences(before, after, additions_count=name != "tests"))
        compared += len(before)
        differs += len(lines)
        for line in lines:
            print(f"{name}: {line}")
        if name == "tests" and (more := after.keys() - before.keys()):
            print(f"tests: {len(more)} new names, not counted")
    print(f"{compared} items compared, {differs or 'none'} differ{'s' if differs == 1 else ''}")
    return 1 if differs or not compared else 0


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], *, additions_count: bool) -> Iterator[str]:
    for item in [*before, *(after.keys() - before.keys())]:
        if item not in after:
            yield f"{item}: gone"
        elif item not in before:
            if additions_count:
                yield f"{item}: new"
        elif before[item] != after[item]:
            changed = difflib.unified_diff(_lines(before[item]), _lines(after[item]), n=0, lineterm="")
            shown = [line for line in changed if not line.startswith(("---", "+++", "@@"))]
            yield f"{item}: changed\n" + "\n".join(f"    {line}" for line in shown)


def _lines(value: Any) -> list[str]:
    """A line for each line of a text, so that a difference within it is shown alone."""
    if isinstance(value, str):
        return value.splitlines()
    if isinstance(value, dict):
        return [f"{key}: {line}" for key, inner in value.items() for line in _lines(inner)]
    return [json.dumps(value)]


def _write(path: pathlib.Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/records", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="write a record of a checkout")
    recorder.add_argument("--checkout", type=pathlib.Path, required=True, metavar="DIR")
    recorder.add_argument(
        "--with-aot",
        type=pathlib.Path,
        metavar="WHEELS",
        help="also compile a few cases of the GPU tables, with the folder that jax's two CUDA wheels are unpacked in",
    )
    recorder.add_argument("out", type=pathlib.Path, metavar="OUT")
    comparer = commands.add_parser("compare", help="print what differs between two records")
    comparer.add_argument("old", type=pathlib.Path, metavar="OLD")
    comparer.add_argument("new", type=pathlib.Path, metavar="NEW")
    for command in (recorder, comparer):
        command.add_argument("--only", metavar="A,B", help=f"sections, of {','.join(SECTIONS)} (all)")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.command == "compare":
        return compare(options.old, options.new, names)
    if options.with_aot is None and not options.only:
        names.remove("aot")
    if "aot" in names and options.with_aot is None:
        parser.error("section aot needs --with-aot WHEELS")
    if not (options.checkout / "x2v_jax").is_dir():
        parser.error(f"--checkout {options.checkout} holds no x2v_jax")
    return record(options.checkout, options.out, names, options.with_aot)


if __name__ == "__main__":
    sys.exit(main())
