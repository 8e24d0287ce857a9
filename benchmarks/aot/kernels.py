"""What the compiler makes of every Hopper kernel at the real shapes, on a machine without a GPU.

    pip install --no-deps --target=wheels jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvdisasm
    python -m benchmarks.aot.kernels --wheels=wheels

Registers, spills (none are allowed), bytes of shared memory and, where there is nvdisasm, tensor core instructions of
each kernel (HGMMA are 16-bit, IGMMA int8, QGMMA float8), loads for all blocks of a cluster (UTMALDG … MULTICAST) and
signals to them (SYNCS … RED). Printed and compared with the committed table; `--write` replaces it. `ptxas` of CUDA
13.0 has to be installed, or the wheels "nvidia-cuda-nvcc<13.1" "nvidia-nvvm<13.1" beside.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import RESULTS
from benchmarks.aot import compare
from benchmarks.aot import compiler as aot_compiler
from benchmarks.gpu import shapes
from x2v_jax.ops.choice import CHOICES

TABLE = RESULTS / "aot_kernels.json"
PRECISIONS = CHOICES["attention_precision"]
DTYPES = ("int8", "float8_e4m3fn")


# 720P is for the large model.
LINEAR = tuple(shape for shape in shapes.LINEAR if not (shape.name.startswith("1.3B") and shape.name.endswith("720P")))
NORMS = tuple(shape for shape in shapes.NORMS if shape.name != "1.3B 720P")


@dataclasses.dataclass(frozen=True)
class Case:
    """make(shape, precision) -> (function, shapes of its arguments), called once jax may be imported."""

    make: Callable[[Any, str], tuple[Callable[..., Any], tuple[Any, ...]]]
    shape: Any
    precision: str


def cases() -> dict[str, Case]:
    """All cases by name."""
    from benchmarks.gpu import operations

    found = {}
    for shape in (*shapes.SELF_ATTENTION, *shapes.CROSS_ATTENTION):
        for precision in PRECISIONS:
            found[f"attention {shape.name}, {precision}"] = Case(operations.hopper_attention, shape, precision)
    for dtype in DTYPES:
        for shape in LINEAR:
            found[f"linear {shape.name}, {dtype}"] = Case(operations.hopper_linear, shape, dtype)
        for shape in NORMS:
            found[f"norm, modulation and quantization {shape.name}, {dtype}"] = Case(
                operations.hopper_norm_quantize, shape, dtype
            )
    for dtype in ("bfloat16", *DTYPES):
        for shape in NORMS:
            name = "norm and rotation" if dtype == "bfloat16" else "norm, rotation and quantization"
            found[f"{name} {shape.name}, {dtype}"] = Case(operations.hopper_norm_rope, shape, dtype)
    return found


def main(arguments: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n")[0]
    options = compare.parser("python -m benchmarks.aot.kernels", description, TABLE).parse_args(arguments)
    if not aot_compiler.prepare(options.wheels):
        print(aot_compiler.MISSING, file=sys.stderr)
        return 1
    return compare.run(options, cases(), measure, line, judge)


def measure(compiler: aot_compiler.Compiler, case: Case) -> dict[str, Any]:
    """One row of the table."""
    if compiler.nvdisasm is None:
        _say_once("no nvdisasm (pip install nvidia-cuda-nvdisasm): instructions are not counted")
    start = time.perf_counter()
    function, arguments = case.make(case.shape, case.precision)
    kernels = compiler.kernels(function, *arguments)
    if not kernels:
        raise RuntimeError("no kernel was compiled: the shape went to another implementation")
    return {
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


@functools.cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def line(row: compare.Row) -> str:
    return f"{row['case']}: {'; '.join(map(_kernel, row['kernels']))}"


def _kernel(kernel: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in kernel["instructions"].items())
    shared = "" if kernel["shared_memory"] is None else f", {kernel['shared_memory']:,} bytes of shared memory"
    return f"{kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled{shared}, {counts or 'no wgmma'}"


def judge(rows: Sequence[compare.Row], committed: Sequence[compare.Row]) -> list[str]:
    """Spills, and whatever differs from the committed table."""
    return compare.spills(rows) + compare.compare(_flat(rows), _flat(committed), near={}, same=FIELDS)


FIELDS = ("count", "registers", "shared_memory", "instructions")


def _flat(rows: Sequence[compare.Row]) -> list[dict[str, Any]]:
    """Columns of the kernels' numbers, so that one that was not measured is None or empty."""
    flat = []
    for row in rows:
        kernels = row["kernels"]
        shared = [kernel["shared_memory"] for kernel in kernels]
        flat.append(
            {
                "case": row["case"],
                "count": len(kernels),
                "registers": [kernel["registers"] for kernel in kernels],
                "shared_memory": None if None in shared else shared,
                "instructions": [k["instructions"] for k in kernels] if any(k["instructions"] for k in kernels) else [],
            }
        )
    return flat


if __name__ == "__main__":
    sys.exit(main())
