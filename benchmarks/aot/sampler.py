"""What a whole four-step video needs of a Hopper GPU, from a compilation on a machine without one.

    pip install --no-deps --target=wheels jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    python -m benchmarks.aot.sampler --wheels=wheels

All steps are one program, as `Denoiser` runs them, at full size: weights are shapes alone, so a few GB of host memory
do. Peak memory counts weights, conditions and temporaries of the sampler (not the encoders, which have left, nor the
VAE). Printed and compared with the committed table: peak memory, temporaries, the largest arrays among them, and the
kernels that a step launches. `--write` replaces the table. XLA chooses its matmul kernels without timing them here.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import RESULTS
from benchmarks.aot import compare
from benchmarks.aot import compiler as aot_compiler
from x2v_jax.diffusion.schedules import Loop

TABLE = RESULTS / "aot_sampler.json"
_LARGEST = 5
# XLA places buffers and fuses the same way every time; another patch version may not.
_NEAR = {"peak": 0.01, "temporaries": 0.02, "kernels_a_step": 0.02}


@dataclasses.dataclass(frozen=True)
class Case:
    """model, size: keys of `programs.CONFIGS` and `PIXELS`. quantization: of the weights. attention, precision: of
    OpChoice. loop: how the steps are one program."""

    model: str
    size: str
    quantization: str | None = None
    attention: str = "hopper"
    precision: str = "full"
    loop: Loop = "unrolled"

    def __str__(self) -> str:
        weights = {None: "bf16", "int8": "int8", "float8_e4m3fn": "fp8"}[self.quantization]
        return f"{self.model} {self.size}, {weights} weights, {self.attention} attention {self.precision}, {self.loop}"


_UNROLLED = (
    Case("T2V-1.3B", "480P"),
    Case("T2V-1.3B", "480P", "int8", precision="int8"),
    Case("I2V-14B", "480P"),
    Case("I2V-14B", "480P", "int8", precision="int8"),
    Case("I2V-14B", "480P", "float8_e4m3fn", precision="e4m3_all"),
    Case("I2V-14B", "720P"),
    Case("I2V-14B", "720P", "int8", precision="int8"),
    Case("I2V-14B", "720P", "float8_e4m3fn", precision="e4m3_all"),
)
CASES = (*_UNROLLED, *(dataclasses.replace(case, loop="scan") for case in _UNROLLED))


def main(arguments: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n")[0]
    options = compare.parser("python -m benchmarks.aot.sampler", description, TABLE).parse_args(arguments)
    if not aot_compiler.prepare(options.wheels):
        print(aot_compiler.MISSING, file=sys.stderr)
        return 1
    return compare.run(options, {str(case): case for case in CASES}, measure, line, judge)


def measure(compiler: aot_compiler.Compiler, case: Case) -> dict[str, Any]:
    """One row of the table. All sizes are bytes."""
    from benchmarks.aot import programs as programs
    from benchmarks.aot.hlo import arrays_made, count_launches
    from x2v_jax.ops.choice import OpChoice

    linear = "auto" if case.quantization is None else "hopper"
    ops = OpChoice(attention=case.attention, attention_precision=case.precision, linear=linear)  # pyright: ignore[reportArgumentType]
    config, latents = programs.CONFIGS[case.model](), programs.latent_shape(case.size)
    program = programs.sampler_program(config, latents, quantization=case.quantization, ops=ops, loop=case.loop)
    start, processor = time.perf_counter(), time.process_time()
    compiled = program.function.lower(*compiler.place(program.arguments), **(program.static or {})).compile()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    memory, text = compiled.memory_analysis(), compiled.as_text()
    launches = count_launches(text)
    largest = sorted({(x.bytes, str(x)) for x in arrays_made(text) if not x.updates}, reverse=True)[:_LARGEST]
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return {
        "peak": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "arguments": arguments,
        "temporaries": memory.temp_size_in_bytes,
        "largest_arrays": [{"array": name, "bytes": size} for size, name in largest],
        "kernels_a_step": round(sum(launches.values()) / len(programs.STEP_LIST)),
        "launches": launches,
        "compile_seconds": round(seconds, 1),
        "compile_processor_seconds": round(processor, 1),
    }


def line(row: compare.Row) -> str:
    sizes = ", ".join(f"{name} {row[name] / 1e9:.2f} GB" for name in ("peak", "arguments", "temporaries"))
    largest = ", ".join(f"{x['array']} {x['bytes'] / 1e6:,.0f} MB" for x in row["largest_arrays"][:3])
    return (
        f"{row['case']}: {sizes}; largest {largest}; {row['kernels_a_step']:,} kernels a step; "
        f"compiled in {row['compile_seconds']} s"
    )


def judge(rows: Sequence[compare.Row], committed: Sequence[compare.Row]) -> list[str]:
    return compare.compare(rows, committed, near=_NEAR)


if __name__ == "__main__":
    sys.exit(main())
