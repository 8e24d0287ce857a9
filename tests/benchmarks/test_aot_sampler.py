"""The table of whole samplers: counting launches in a program's text, and what the committed numbers say."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.aot import kernels as aot_kernels
from benchmarks.aot import sampler, tables
from benchmarks.aot.hlo import count_launches
from benchmarks.aot.programs import latent_shape, sampler_program
from benchmarks.reports import part
from x2v_jax.models.config import WanConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %e = f32[4]{0} exponential(%p)
}

%inner (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %k = f32[4]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2"
  ROOT %r = (s32[], f32[4]{0}) tuple(%x, %k)
}

%body (t: (s32[], f32[4], /*index=2*/f32[4])) -> (s32[], f32[4]) {
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %w = (s32[], f32[4]{0}, /*index=2*/f32[4]{0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %b = f32[4]{0} bitcast(%y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[4]{0}) copy-start(%a)
  %d = f32[4]{0} copy-done(%s)
  %w = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %v = f32[4]{0} call(%a), to_apply=%body
  ROOT %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_a_loop_launches_its_body_as_often_as_it_runs():
    assert count_launches(PROGRAM) == {"copy": 1, "fusion": 12, "mosaic_gpu_v2": 33}


def test_latents_of_81_frames():
    assert latent_shape("480P") == (21, 60, 104)
    assert latent_shape("720P") == (21, 90, 160)


def test_the_program_is_made_of_shapes_alone():
    config = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16, text_len=12)
    program = sampler_program(config, (3, 4, 6), quantization="int8")
    params, conditions, initial, _, sigmas = program.arguments
    assert params["blocks"]["ffn"]["linear_1"]["weight"].shape == (2, 48, 32)
    assert conditions.text.shape == (1, 12, 24) and initial.shape == (1, 3, 4, 6, 16)
    assert program.static is None and len(sigmas) == 4


def _row(peak: int) -> dict:
    return {"case": "a", "peak": peak, "temporaries": 10, "kernels_a_step": 5}


def test_more_memory_than_committed_is_told():
    assert sampler.judge([_row(1000)], [_row(1000)]) == []
    assert sampler.judge([_row(1100)], [_row(1000)]) == ["a: peak was 1,000, is 1,100"]


def test_the_document_says_what_the_committed_tables_say():
    kernels, samplers = (json.loads(m.TABLE.read_text())["cases"] for m in (aot_kernels, sampler))
    assert part(tables.DOCUMENT.read_text(), tables.PART) == tables.markdown(kernels, samplers)


WHEELS = os.environ.get("X2V_CUDA_WHEELS", "")
NO_WHEELS = "the CUDA compiler wheels are not installed (pip install jax-cuda13-plugin jax-cuda13-pjrt)"


@pytest.mark.skipif(not WHEELS and importlib.util.find_spec("jax_plugins") is None, reason=NO_WHEELS)
def test_what_is_compiled_is_as_committed():
    case = "T2V-1.3B 480P, bf16 weights, hopper attention full, scan"
    command = [sys.executable, "-m", "benchmarks.aot.sampler", f"--only={case}"]
    command += [f"--wheels={WHEELS}"] if WHEELS else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
