"""The tables of compiled kernels: reading what the compiler says, and comparing it with what is committed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.aot import compare, compiler
from benchmarks.aot import kernels as aot_kernels
from benchmarks.aot.compiler import Kernel, read_log
from benchmarks.gpu import shapes
from x2v_jax.ops.linear_8bit.config import config_for

ROOT = pathlib.Path(__file__).resolve().parents[2]

LOG = """
Resources(smem_scratch_bytes=216064, tmem_scratch_cols=0, barrier_counts=Counter())
ptxas info    : (C7519) warpgroup.arrive is injected in around line 1444 by compiler
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for kernel_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
//--------------------- .text.kernel_mosaic_gpu_kernel --------------------------
        /*25d0*/                   IGMMA.64x256x32.S8.S8 R24, gdesc[UR8], R24 ;
        /*26f0*/                   IGMMA.64x256x32.S8.S8 R24, gdesc[UR8], R24, gsb0 ;
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0, barrier_counts=Counter())
ptxas info    : Compiling entry function 'other' for 'sm_90a'
    40 bytes stack frame, 32 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
        /*0010*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ ;
"""


def test_each_kernel_of_a_log_has_its_own_numbers():
    assert read_log(LOG) == [
        Kernel(168, 0, 216064, {"IGMMA.64x256x32.S8.S8": 2}),
        Kernel(128, 32, 1024, {"QGMMA.64x128x32.F32.E4M3.E4M3": 1}),
    ]


def test_a_log_without_kernels_is_empty_and_a_damaged_one_an_error():
    assert read_log("nothing to see") == []
    with pytest.raises(ValueError, match="not what ptxas says"):
        read_log("Compiling entry function 'a'\nUsed many registers")


def _rows(registers: int = 168, spilled: int = 0, instructions: dict | None = None) -> list[dict]:
    kernel = {"registers": registers, "spill_bytes": spilled, "shared_memory": 1024}
    return [{"case": "attention", "kernels": [{**kernel, "instructions": instructions or {}}]}]


def test_what_is_as_committed_is_right():
    assert aot_kernels.judge(_rows(), _rows()) == []


def test_spills_are_wrong_even_where_they_are_committed():
    assert aot_kernels.judge(_rows(spilled=32), _rows(spilled=32)) == ["attention: 32 bytes of registers are spilled"]


def test_a_change_is_told_by_the_field_that_changed():
    assert aot_kernels.judge(_rows(registers=160), _rows()) == ["attention: registers was [168], is [160]"]
    fewer, more = ({"HGMMA.64x128x16": n} for n in (16, 32))
    (sentence,) = aot_kernels.judge(_rows(instructions=fewer), _rows(instructions=more))
    assert "instructions was" in sentence


def test_instructions_that_one_side_could_not_count_are_not_compared():
    assert aot_kernels.judge(_rows(), _rows(instructions={"HGMMA.64x128x16": 32})) == []


def test_new_and_lost_cases_are_told():
    assert aot_kernels.judge(_rows(), []) == ["attention: not in the committed table"]
    assert aot_kernels.judge([], _rows()) == ["attention: in the committed table and not compiled"]


def test_numbers_may_differ_by_their_share():
    near = {"peak": 0.01}
    row, committed = {"case": "a", "peak": 1009}, {"case": "a", "peak": 1000}
    assert compare.compare([row], [committed], near=near) == []
    assert compare.compare([{**row, "peak": 1011}], [committed], near=near) == ["a: peak was 1,000, is 1,011"]


def test_new_rows_replace_those_of_their_case_and_lost_cases_leave():
    before = [{"case": "a", "n": 1}, {"case": "b", "n": 2}, {"case": "gone", "n": 3}]
    assert compare.merged(before, [{"case": "b", "n": 4}, {"case": "c", "n": 5}], ["a", "b", "c"]) == [
        {"case": "a", "n": 1},
        {"case": "b", "n": 4},
        {"case": "c", "n": 5},
    ]


def test_no_case_of_a_name_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "Compiler", lambda tools: None)
    options = compare.parser("x", "y", aot_kernels.TABLE).parse_args(["--only", "nonsense"])
    assert compare.run(options, {"a": 1}, lambda *_: {}, str, lambda *_: []) == 2
    assert "--only nonsense: no case has this in its name; there are a" in capsys.readouterr().err


def test_without_the_wheels_it_says_what_to_install(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert aot_kernels.main([f"--wheels={tmp_path}"]) == 1
    assert "Install jax-cuda13-plugin and jax-cuda13-pjrt" in capsys.readouterr().err


def test_a_tool_is_found_in_an_unpacked_wheel(tmp_path: pathlib.Path):
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert compiler.find_tool("nvdisasm", (tmp_path,)) == tool


def test_no_kernel_of_the_committed_table_spills_or_is_too_large():
    table = json.loads(aot_kernels.TABLE.read_text())
    assert compare.spills(table["cases"]) == []
    kernels = [kernel for row in table["cases"] for kernel in row["kernels"]]
    assert max(kernel["shared_memory"] for kernel in kernels) <= compiler.SHARED_MEMORY_LIMIT


# What a linear layer's kernel has where the tiles of its shape are for clusters.
CLUSTERED = {
    (f"linear {shape.name}", dtype): {"UTMALDG", "SYNCS"} if config is not None and config.cluster > 1 else set()
    for shape in shapes.LINEAR
    for dtype in aot_kernels.DTYPES
    for config in [config_for(shape.n, shape.k, dtype, "residual" if shape.epilogue == "residual" else "plain")]
}


def test_the_committed_table_has_the_tensor_core_instructions_of_each_precision():
    rows = {row["case"]: row for row in json.loads(aot_kernels.TABLE.read_text())["cases"]}
    found = dict(rows)
    expected = {
        "full": {"HGMMA"},
        "int8": {"IGMMA", "HGMMA"},
        "e4m3": {"QGMMA", "HGMMA"},
        "e4m3_all": {"QGMMA"},
        "int8_e4m3": {"IGMMA", "QGMMA"},
    }
    expected |= {"float8_e4m3fn": {"QGMMA"}}
    for case, row in found.items():
        if not case.startswith(("attention", "linear")):
            continue
        precision = case.rpartition(", ")[2]
        wanted = expected[precision]
        if case.startswith("linear"):
            wanted = {"IGMMA" if precision == "int8" else "QGMMA"} | CLUSTERED[case.rpartition(", ")[0], precision]
        assert {name.split(".")[0] for kernel in row["kernels"] for name in kernel["instructions"]} == wanted, case


WHEELS = os.environ.get("X2V_CUDA_WHEELS", "")
NO_WHEELS = "the CUDA compiler wheels are not installed (pip install jax-cuda13-plugin jax-cuda13-pjrt)"


@pytest.mark.skipif(not WHEELS and importlib.util.find_spec("jax_plugins") is None, reason=NO_WHEELS)
@pytest.mark.parametrize("only", ["attention 1.3B chunk, 480P cache, int8", "linear 1.3B output chunk, int8"])
def test_what_is_compiled_is_as_committed(only: str):
    command = [sys.executable, "-m", "benchmarks.aot.kernels", f"--only={only}"]
    command += [f"--wheels={WHEELS}"] if WHEELS else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
