"""Measures this project on the GPU that is there. Correctness comes first; what is wrong has no time.

    python -m benchmarks.gpu all --quick                 # everything, in under ten minutes
    python -m benchmarks.gpu kernels|models [--quick]    # a half of it
    python -m benchmarks.gpu kernels --autotune          # tries tile sizes, and writes the tables that the kernels read
    python -m benchmarks.gpu models --profile            # a trace of one run of each model, and its picture
    python -m benchmarks.gpu table --write               # publishes the last report: JSON and docs/performance.md

Each section runs in a process of its own and is written after every row, so that an error, out of memory or the end of
the time costs no more than its own row. The report is gpu.json in --out.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import sections, table
from benchmarks.gpu.settings import Settings

DEFAULT_OUT = ROOT / "outputs" / "gpu"
_QUICK_MINUTES = 9.5
# A section is begun only with so many seconds left: most of them go into starting.
_LEAST = 10
# Of its own time a section keeps this for writing and ending.
_MARGIN = 3


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    if options.what == "table":
        return table.main(options.out, write=options.write)
    if options.what == "section":
        return _section(options)
    if options.autotune:
        return _child([*_python(), "benchmarks.gpu.autotune", *_passed(options)], None)
    if not options.tiny and not _is_gpu_here():
        print("error: jax finds no GPU here; --tiny tries the programs on what there is", file=sys.stderr)
        return 2
    return _all(options)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whats = ("kernels", "models", "all", "table")
    parser.add_argument("what", choices=(*whats, "section"), metavar=f"{{{','.join(whats)}}}")
    parser.add_argument("--quick", action="store_true", help="headline shapes and few runs")
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_OUT, help="folder of the reports")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="these sections alone")
    parser.add_argument("--minutes", type=float, help=f"stop after so long; default: {_QUICK_MINUTES} with --quick")
    parser.add_argument("--seed", type=int, help="of weights and inputs; default: another one every time")
    parser.add_argument("--autotune", action="store_true", help="with kernels: find and write tile sizes")
    parser.add_argument("--profile", action="store_true", help="with models: record traces")
    parser.add_argument("--write", action="store_true", help="with table: put it into docs/performance.md")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the programs out")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    known = [section.name for section in sections.SECTIONS]
    for name in options.only:
        if name not in known:
            parser.error(f"--only {name}: there is no such section; there are {', '.join(known)}")
    if options.what == "section" and options.name not in known:
        parser.error(f"section is for this program itself; give one of {', '.join(whats)}, and --only for sections")
    if options.autotune and options.what != "kernels":
        parser.error("--autotune goes with kernels")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: give more than 0")
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little") % 2**31
    options.given = list(sys.argv[1:] if argv is None else argv)
    return options


def chosen(options: argparse.Namespace) -> list[sections.Section]:
    """The sections to run, in order."""
    found = [s for s in sections.SECTIONS if options.what in ("all", s.group)]
    if options.only:
        return [s for s in found if s.name in options.only]
    return [s for s in found if s.seconds or not options.quick]


def _all(options: argparse.Namespace) -> int:
    minutes = options.minutes or (_QUICK_MINUTES if options.quick else None)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    failed = 0
    for section in chosen(options):
        path = sections.section_file(options.out, section.name)
        path.unlink(missing_ok=True)
        left = None if end is None else end - time.monotonic()
        if left is not None and left < _LEAST:
            print(f"== {section.name}: not run, the time is up", flush=True)
            failed += 1
        else:
            # One that takes longer than planned may take from those behind it, but not all that is left.
            limit = None if left is None else min(left, max(2.0 * section.seconds, 60.0))
            print(f"== {section.name}" + ("" if limit is None else f" (at most {limit:.0f} s)"), flush=True)
            command = [*_python(), "benchmarks.gpu", "section", "--name", section.name, *_passed(options)]
            failed += bool(_child(command, limit))
        _merge(options)
    report = json.loads((options.out / "gpu.json").read_text())
    print(table.text(report))
    print(f"written: {options.out / 'gpu.json'}")
    return 1 if failed else 0


def _section(options: argparse.Namespace) -> int:
    deadline = None if options.seconds is None else time.monotonic() + options.seconds - _MARGIN
    settings = Settings(
        out=options.out, quick=options.quick, tiny=options.tiny, seed=options.seed, profile=options.profile,
        deadline=deadline,
    )  # fmt: skip
    command = shlex.join(["python", "-m", "benchmarks.gpu", *options.given])
    return 1 if sections.run(options.name, settings, command) else 0


def _child(command: Sequence[str], seconds: float | None) -> int:
    """Runs a process of this package, and ends it when its time is up. What it has written stays."""
    more = [] if seconds is None else ["--seconds", str(seconds)]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / "outputs" / "compilation_cache"), **os.environ}
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # Nothing else is on the GPU: sections ask for what they need, and peaks are those of their arrays.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    process = subprocess.Popen([*command, *more], cwd=ROOT, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print("   ended: its time was up", flush=True)
        return 1
    finally:
        process.kill()
        process.wait()


def _is_gpu_here() -> bool:
    """Asked in another process: this one must not hold any of the GPU's memory."""
    question = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", question], check=False, capture_output=True).returncode == 0


def _python() -> list[str]:
    return [sys.executable, "-m"]


def _passed(options: argparse.Namespace) -> list[str]:
    flags = [f"--{name}" for name in ("quick", "tiny", "profile") if getattr(options, name)]
    return [*flags, "--seed", str(options.seed), "--out", str(options.out.resolve())]


def _merge(options: argparse.Namespace) -> None:
    """gpu.json: all sections that have a file, also those of an earlier run."""
    report: dict[str, Any] = {"sections": {}}
    for section in sections.SECTIONS:
        path = sections.section_file(options.out, section.name)
        if path.exists():
            report["sections"][section.name] = json.loads(path.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
