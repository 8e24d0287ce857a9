"""Traces as seconds by kind of operation."""

import gzip
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from benchmarks.gpu import profile


def _track(pid: int, tid: int, process: str, thread: str) -> list[dict]:
    return [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}},
        {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}},
    ]


def _event(tid: int, name: str, start: float, length: float, **arguments) -> dict:
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": start, "dur": length, "args": arguments}


def test_kernels_of_a_gpus_streams_count_by_their_names():
    events = _track(1, 7, "/device:GPU:0", "Stream #13(Compute)") + _track(2, 9, "/host:CPU", "tf_XLAEigen/1")
    events += [
        _event(7, "attention_hopper_kernel", 0, 3e6, correlation_id=1),
        _event(7, "nvjet_tst_128x256", 3e6, 2e6, correlation_id=2),
        _event(7, "MemcpyD2D", 5e6, 1e6, memcpy_details="x"),
        {**_event(9, "fusion.1", 0, 9e6, hlo_op="fusion.1"), "pid": 2},
    ]
    assert profile.categories(events) == {"attention": 3.0, "matmul": 2.0, "copies": 1.0}


def test_an_event_within_another_counts_for_itself():
    events = _track(1, 7, "/host:CPU", "tf_XLAPjRtCpuClient/1")
    events += [
        _event(7, "while.1", 0, 10e6, hlo_op="while.1"),
        _event(7, "convolution.2", 1e6, 4e6, hlo_op="convolution.2"),
        _event(7, "dot.3", 6e6, 1e6, hlo_op="dot.3"),
    ]
    assert profile.categories(events) == {"other": 5.0, "convolution": 4.0, "matmul": 1.0}


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("matmul_hopper_kernel", "8-bit matmul"),
        ("layernorm_modulate_quantize", "norms, rotation, quantization"),
        ("sm90_xmma_fprop_implicit_gemm", "convolution"),
        ("loop_convert_fusion", "other fusions"),
        ("ncclDevKernel_AllGather", "communication"),
    ],
)
def test_names_of_kernels(name: str, category: str):
    assert profile.category({"name": name}) == category


@pytest.mark.slow
def test_a_run_on_a_cpu_is_recorded_and_drawn(tmp_path: pathlib.Path):
    call = jax.jit(lambda x: jnp.tanh(x @ x).sum(0))
    x = jnp.ones((128, 128))
    seconds = profile.profiled(tmp_path / "run", lambda: call(x))
    assert seconds and all(value > 0 for value in seconds.values())
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 400
    assert profile.main([str(tmp_path / "run"), f"--png={tmp_path / 'again.png'}"]) == 0
    assert (tmp_path / "again.png").exists()


def test_a_folder_without_a_trace_is_said(tmp_path: pathlib.Path, capsys):
    assert profile.main([str(tmp_path)]) == 2
    assert "no trace below" in capsys.readouterr().err


def test_the_newest_trace_counts(tmp_path: pathlib.Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with gzip.open(tmp_path / name / "host.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": [{"name": name}]}, file)
    os.utime(tmp_path / "a" / "host.trace.json.gz", (1, 1))
    assert profile.read_trace(profile.newest_trace(tmp_path)) == [{"name": "b"}]
