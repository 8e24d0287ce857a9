"""The table of what a block needs of an H200's memory, and the reader of compiled programs behind it."""

import importlib.util
import json
import pathlib
import sys

from benchmarks.aot import memory
from benchmarks.aot.hlo import Made, arrays_made

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "aot_memory.json"

PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused_dynamic_update_slice (p: bf16[9,4], q: bf16[1,4]) -> bf16[9,4] {
  %p = bf16[9,4]{1,0} parameter(0)
  %inside = f32[9,4]{1,0} convert(%p)
  ROOT %dus = bf16[9,4]{1,0} dynamic-update-slice(%p, %q, %i, %j)
}

ENTRY %main (a: bf16[9,4]) -> bf16[9,4] {
  %a = bf16[9,4]{1,0} parameter(0)
  %copy.1 = bf16[9,4]{0,1} copy(%a)
  %start = ((bf16[9,4]), bf16[1,4]{1,0}) fusion-start(%a), calls=%other
  %done = bf16[1,4]{1,0} fusion-done(%start)
  %loop = bf16[9,4]{1,0} fusion(%a, %done), kind=kLoop, calls=%fused_dynamic_update_slice
  %pair = (f32[3]{0}, s8[5,2]{1,0}) fusion(%a), kind=kInput, calls=%both
  ROOT %out = bf16[9,4]{1,0} bitcast(%loop)
}
"""


def test_arrays_of_a_program_are_those_outside_fusions():
    assert arrays_made(PROGRAM) == [
        Made("copy.1", "copy", "bf16", (9, 4)),
        Made("done", "fusion-done", "bf16", (1, 4)),
        Made("loop", "fusion", "bf16", (9, 4), updates=True),
        Made("pair", "fusion", "f32", (3,)),
        Made("pair", "fusion", "s8", (5, 2)),
    ]
    assert [x.bytes for x in arrays_made(PROGRAM)] == [72, 8, 72, 12, 10]
    assert str(arrays_made(PROGRAM)[0]) == "bf16[9,4]"


def test_without_the_wheels_it_says_what_to_install(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = tmp_path / "table.json"
    assert memory.main([f"--wheels={tmp_path}", f"--output={output}"]) == 1
    assert "Install jax-cuda13-plugin and jax-cuda13-pjrt" in capsys.readouterr().err
    assert not output.exists()


def _rows(**fields) -> list[dict]:
    cases = json.loads(TABLE.read_text())["cases"]
    found = [row for row in cases if all(row[name] == value for name, value in fields.items())]
    assert found
    return found


def test_the_measured_table_has_no_copy_of_the_cache():
    for row in _rows():
        assert row["copies_of_cache"] == row["arrays_of_all_rows"] == 0
        assert row["aliased"] == row["cache"]


def test_attention_and_cache_of_the_small_model_take_less_than_100_mb_at_any_window():
    rows = _rows(model="1.3B")
    assert all(row["temporaries"] - row["temporaries_without_attention"] < 100e6 for row in rows)
    short, long = (_rows(model="1.3B", window=n, sink=0, cache_dtype="bfloat16")[0] for n in (21, 84))
    assert short["temporaries"] == long["temporaries"]


def test_8_bits_halve_the_cache_of_the_table():
    for model in ("1.3B", "14B"):
        whole, half = (_rows(model=model, window=21, sink=0, cache_dtype=d)[0] for d in ("bfloat16", "int8"))
        assert half["cache"] / whole["cache"] < 0.52
