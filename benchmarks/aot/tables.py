"""Puts the committed tables of compiled programs into docs/performance.md: `python -m benchmarks.aot.tables`."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import DOCUMENTS
from benchmarks.aot import kernels as aot_kernels
from benchmarks.aot import sampler
from benchmarks.reports import replace_part

DOCUMENT = DOCUMENTS / "performance.md"
PART = "aot"
# One row a kernel suffices where all shapes give the same.
_SHAPES = ("14B 480P", "14B projection 480P", "14B ffn 1 480P", "14B ffn 2 480P")


def main() -> int:
    DOCUMENT.write_text(replace_part(DOCUMENT.read_text(), PART, markdown(*map(_rows, (aot_kernels, sampler)))))
    return 0


def markdown(kernels: Sequence[Mapping[str, Any]], samplers: Sequence[Mapping[str, Any]]) -> str:
    """The kernels at the 14B model's 480P shapes, and all samplers."""
    lines = [f"{len(kernels)} kernels and shapes, none of which spills; those of the 14B model at 480P:", ""]
    lines += [
        "| kernel | registers | shared memory, bytes | tensor core instructions, loads and signals of a cluster |"
    ]
    lines.append("|---|---|---|---|")
    for row in kernels:
        if not any(row["case"].rpartition(",")[0].endswith(shape) for shape in _SHAPES):
            continue
        for kernel in row["kernels"]:
            counts = ", ".join(f"{number} {name}" for name, number in kernel["instructions"].items())
            lines.append(f"| {row['case']} | {kernel['registers']} | {kernel['shared_memory']:,} | {counts} |")
    lines += ["", "| four-step sampler | peak memory | of it temporaries | largest array | kernels a step |"]
    lines.append("|---|---|---|---|---|")
    for row in samplers:
        peak, temporaries = (f"{row[key] / 1e9:.1f} GB" for key in ("peak", "temporaries"))
        largest = row["largest_arrays"][0]
        size = f"{largest['array']}, {largest['bytes'] / 1e6:,.0f} MB"
        lines.append(f"| {row['case']} | {peak} | {temporaries} | {size} | {row['kernels_a_step']:,} |")
    return "\n".join(lines)


def _rows(module: Any) -> list[dict[str, Any]]:
    return json.loads(module.TABLE.read_text())["cases"] if module.TABLE.exists() else []


if __name__ == "__main__":
    sys.exit(main())
