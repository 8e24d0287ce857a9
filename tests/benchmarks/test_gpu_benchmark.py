"""The measuring programs at tiny sizes on a CPU: they run, tell what is wrong, and one failure costs one row."""

import argparse
import json
import pathlib
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import ceilings, checks, sections, shapes, torch_side, training
from benchmarks.gpu.settings import Settings, models
from benchmarks.gpu.timing import Parts, Timing, timed
from benchmarks.gpu.weights import RandomNetwork, random_params
from x2v_jax.models.config import WanConfig


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Settings:
    return Settings(out=tmp_path, tiny=True, seed=3)


def _run(name: str, settings: Settings) -> list[dict]:
    sections.run(name, settings, "python -m benchmarks.gpu")
    report = json.loads(sections.section_file(settings.out, name).read_text())
    assert "failed" not in report and report["about"]["versions"]["jax"]
    return report["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "linear", "norms"])
def test_kernels_are_right_before_they_are_timed(name: str, settings: Settings):
    rows = _run(name, settings)
    assert rows and all("failed" not in row for row in rows), rows
    assert all(0 <= row["relative_error"] < 0.2 and row["seconds"] > 0 for row in rows)


def test_ceilings_are_found_by_those_who_compare_with_them(settings: Settings):
    _run("ceilings", settings)
    limits = ceilings.measured_ceilings(settings)
    assert set(limits) == {"bfloat16", "int8", "float8_e4m3fn", "bytes"}
    assert ceilings.share_of_ceiling(2.0, {"a": 4.0, "b": 2.0, "bytes": 1.0}, {"a": 4.0, "b": 2.0, "bytes": 1.0}) == 1.0
    assert ceilings.share_of_ceiling(2.0, {"a": 4.0}, {}) is None


@pytest.mark.slow
def test_a_video_is_timed_part_by_part(settings: Settings):
    rows = {row["part"]: row for row in _run("i2v_14b_480p_int8", settings)}
    steps = [f"step {i}" for i in range(1, 5)]
    assert list(rows) == ["text", "image", "denoise", *steps, "VAE decode", "video file", "end to end"]
    counted = [rows[part]["seconds"] for part in ("text", "image", "denoise", "VAE decode", "video file")]
    assert rows["end to end"]["seconds"] == pytest.approx(sum(counted), rel=0.01)


@pytest.mark.slow
def test_a_stream_tells_denoising_and_vae_apart_and_together(settings: Settings):
    (row,) = _run("stream_1_3b", settings)
    assert row["frames_a_second"] * row["seconds"] == pytest.approx(12)
    assert row["denoise_seconds"] > 0 and row["vae_seconds"] > 0 and row["first_frame_seconds"] > 0


@pytest.mark.slow
def test_a_training_step_runs_on_random_weights(settings: Settings):
    rows = {row["part"]: row for row in _run("training_self_forcing", settings)}
    assert rows["step"]["seconds"] == pytest.approx(
        rows["critic"]["seconds"] + rows["generator"]["seconds"] / 5, rel=0.01
    )


@pytest.mark.parametrize("recipe", training.RECIPES)
def test_recipes_are_the_trainers_own_at_full_size(recipe: str, tmp_path: pathlib.Path):
    config = training.recipe_config(recipe, tmp_path, models("T2V-1.3B", "480P", Settings(out=tmp_path)))
    task = training.RandomDmd(config)
    assert task.model_config == WanConfig.t2v_1_3b() and task.shape == (21, 60, 104, 16)
    assert task.is_causal == (recipe == "self_forcing") and len(task.sigmas) == 4
    assert task.one_batch(0)["exit_step"].tolist() == [3]


def test_loading_is_in_bytes_a_second(settings: Settings):
    assert [row["bytes_a_second"] > 0 for row in _run("loading", settings)] == [True, True]


def test_a_wrong_result_has_no_time(settings: Settings):
    def measure() -> dict:
        checks.check(jnp.ones(4), jnp.zeros(4) + 2, 0.1, "ours")
        raise AssertionError("not reached")

    row = sections.guarded(settings, {"case": "a"}, measure)
    assert row == {"case": "a", "failed": "Wrong: ours: relative error 0.5 where at most 0.1 is right"}
    with pytest.raises(checks.Wrong, match="NaN"):
        checks.check_finite(jnp.array([1.0, jnp.nan]))
    with pytest.raises(checks.Wrong):
        checks.check(jnp.array([jnp.nan]), jnp.ones(1), 0.1, "ours")


def test_an_error_ends_its_row_and_what_was_written_stays(settings: Settings, monkeypatch):
    def rows(settings: Settings):
        yield {"case": "first", "seconds": 1.0}
        yield sections.guarded(settings, {"case": "second"}, lambda: 1 // 0)
        yield {"case": "third", "seconds": 1.0}
        raise MemoryError("out of memory")

    monkeypatch.setattr(sections.Section, "load", lambda self: rows)
    assert sections.run("ceilings", settings, "x") == 2
    report = json.loads(sections.section_file(settings.out, "ceilings").read_text())
    assert [row["case"] for row in report["rows"]] == ["first", "second", "third"]
    assert report["rows"][1]["failed"].startswith("ZeroDivisionError")
    assert report["failed"] == "MemoryError: out of memory"


def test_nothing_is_begun_when_the_time_is_up(tmp_path: pathlib.Path):
    late = Settings(out=tmp_path, deadline=time.monotonic() - 1)
    assert sections.guarded(late, {}, lambda: {"seconds": 1})["failed"] == "not run: the time was up"


def test_times_are_of_the_call_without_its_first():
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.median, timing.low, timing.high) == (2.0, 1.0, 3.0)
    calls = []
    timed(Settings(out=pathlib.Path(), tiny=True), lambda: calls.append(1) or jnp.ones(1))
    assert len(calls) == 2 + 3


def test_parts_that_take_long_are_called_once_more(settings: Settings):
    parts = Parts(settings)
    assert parts("short", lambda: 5) == 5
    assert len(parts.found[0].seconds) == 2
    parts("once", lambda: 1, rounds=0)
    assert len(parts.found[1].seconds) == 1


@pytest.mark.usefixtures("without_type_checks")  # shapes stand in for tensors
def test_random_weights_have_the_types_of_a_checkpoint_and_keep_activations_of_one_size():
    config = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16, text_len=12)
    for quantization, dtype in ((None, "bfloat16"), ("int8", "int8"), ("float8_e4m3fn", "float8_e4m3fn")):
        network = RandomNetwork(config, quantization=quantization)
        ffn = network.load()["blocks"]["ffn"]["linear_1"]
        matrix = ffn["kernel"] if quantization is None else ffn["weight"].swapaxes(1, 2)
        assert matrix.dtype == dtype and matrix.shape == (2, 32, 48)
        values = np.asarray(matrix, np.float32) * (1 if quantization is None else np.asarray(ffn["scale"])[:, None])
        assert values.std() * np.sqrt(32) == pytest.approx(1, rel=0.15)
        network.release()
        assert not network.is_loaded
    assert random_params({}) == {}


def test_torch_is_left_out_with_a_sentence_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch_side.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(torch_side.PYTHON_VARIABLE, raising=False)
    (row,) = torch_side.torch_rows(None)
    assert torch_side.PYTHON_VARIABLE in row["left_out"]


def test_quick_sections_fit_into_ten_minutes_and_have_the_headline_runs():
    quick = program.chosen(argparse.Namespace(what="all", only=[], quick=True))
    assert sum(section.seconds for section in quick) <= 60 * program._QUICK_MINUTES
    names = {section.name for section in quick}
    assert {"i2v_14b_480p_int8", "i2v_14b_480p_bf16", "i2v_14b_720p_int8", "t2v_1_3b_480p_int8"} <= names
    everything = program.chosen(argparse.Namespace(what="all", only=[], quick=False))
    assert "i2v_14b_720p_bf16" in {section.name for section in everything}
    kernels = program.chosen(argparse.Namespace(what="kernels", only=[], quick=False))
    assert {section.group for section in kernels} == {"kernels"}


def test_the_driver_runs_sections_in_processes_and_merges_them(tmp_path: pathlib.Path, capfd):
    assert program.main(["all", "--tiny", "--quick", "--only", "ceilings", "torch", f"--out={tmp_path}"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["sections"]) == {"ceilings", "torch"}
    assert "matmul int8" in capfd.readouterr().out


def test_a_section_that_has_no_time_left_is_not_begun(tmp_path: pathlib.Path, capsys):
    assert program.main(["all", "--tiny", "--minutes=0.01", "--only", "ceilings", f"--out={tmp_path}"]) == 1
    assert "not run, the time is up" in capsys.readouterr().out


def test_without_a_gpu_nothing_large_is_begun(tmp_path: pathlib.Path, capsys):
    assert program.main(["all", "--quick", f"--out={tmp_path}"]) == 2
    assert "jax finds no GPU here; --tiny" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["all", "--only", "nothing"], ["all", "--autotune"], ["all", "--minutes=-1"], ["section"]]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert arguments[-1].split("=")[0] in capsys.readouterr().err


def test_flops_of_the_headline_shapes():
    first = shapes.SELF_ATTENTION[0]
    assert first.flops == 4 * 32_760**2 * 40 * 128
    assert len(shapes.LINEAR) == 24
