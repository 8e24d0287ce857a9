"""What one step of a block-by-block video needs of an H200's memory, from a compilation on a machine without one.

    pip install --no-deps --target=wheels jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    python -m benchmarks.aot.memory --wheels=wheels

`ptxas` of CUDA 13.0 has to be installed, or the wheels "nvidia-cuda-nvcc<13.1" "nvidia-nvvm<13.1" beside those two.
The program is `Rollout.block` for a block of 3 latent frames at 480 x 832, at full size in bfloat16, as XLA compiles it
for sm_90a: cuDNN cannot be compiled without a GPU, so attention is the reference's. Printed and written to --output:
arguments, outputs, how much of them is the same memory, temporaries, and the largest arrays among these. Beside them
the temporaries of the same program without self attention and cache, which are activations and slices of weights.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks import RESULTS
from benchmarks.aot import compiler

DEFAULT_OUTPUT = RESULTS / "aot_memory.json"
_LARGEST = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """model: "1.3B" or "14B". window and sink: latent frames."""

    model: str = "1.3B"
    window: int = 21
    sink: int = 0
    cache_dtype: str = "bfloat16"


CASES = (
    Case(),
    Case(window=84),
    Case(sink=3),
    Case(cache_dtype="int8"),
    Case(cache_dtype="int8_e4m3"),
    Case(cache_dtype="int8", sink=3),
    Case(model="14B"),
    Case(model="14B", cache_dtype="int8"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheels", type=pathlib.Path, help="folder that jax's two CUDA wheels are unpacked in")
    parser.add_argument("--output", type=pathlib.Path, default=DEFAULT_OUTPUT)
    options = parser.parse_args(arguments)
    if not compiler.prepare(options.wheels):
        print(compiler.MISSING, file=sys.stderr)
        return 1
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(_line(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("x2v-jax", "jax", "jaxlib", "flax")}
    record = {"target": "NVIDIA H200 (sm_90a), compiled without one", "versions": versions, "cases": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(case: Case) -> dict[str, Any]:
    """One row of the table. All sizes are bytes."""
    from benchmarks.aot.hlo import arrays_made
    from benchmarks.aot.programs import arrays_of, compile_block

    start = time.perf_counter()
    compiled, cache = compile_block(case, compiler.TARGET.read_text())
    seconds = time.perf_counter() - start
    memory, leaves = compiled.memory_analysis(), arrays_of(cache)
    shapes, rows = {x.shape for x in leaves}, cache.layout.rows
    others = [x for x in arrays_made(compiled.as_text()) if not (x.updates and x.shape in shapes)]
    largest = sorted({(x.bytes, str(x)) for x in others}, reverse=True)[:_LARGEST]
    return {
        **dataclasses.asdict(case),
        "cache": sum(x.size * x.dtype.itemsize for x in leaves),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "temporaries_without_attention": _activations(case.model),
        "largest_arrays": [{"array": name, "bytes": size} for size, name in largest],
        "copies_of_cache": sum(x.shape in shapes for x in others),
        # Rows of a layer, or scores of them. No other dimension is as large.
        "arrays_of_all_rows": sum(max(x.shape, default=0) >= rows for x in others),
        "compile_seconds": round(seconds, 1),
    }


@functools.cache
def _activations(model: str) -> int:
    from benchmarks.aot.programs import compile_block, without_attention

    compiled, _ = compile_block(Case(model=model), compiler.TARGET.read_text(), without_attention)
    return compiled.memory_analysis().temp_size_in_bytes


def _line(row: dict[str, Any]) -> str:
    sizes = ("cache", "arguments", "outputs", "aliased", "temporaries", "temporaries_without_attention")
    what = f"{row['model']} window {row['window']} sink {row['sink']} {row['cache_dtype']}"
    copies = f"{row['copies_of_cache']} copies of the cache, {row['arrays_of_all_rows']} arrays of all rows"
    numbers = ", ".join(f"{name} {row[name] / 1e6:,.0f} MB" for name in sizes)
    return f"{what}: {numbers}; {copies}, largest array {row['largest_arrays'][0]['array']}"


if __name__ == "__main__":
    sys.exit(main())
