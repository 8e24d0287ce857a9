"""The CPU benchmark: both sides run every case in turn, and the report says what it was taken on."""

import io
import json
import pathlib
import sys

import pytest

from benchmarks.speed import cpu, cpu_cases

_TINY = {
    "dit": cpu_cases.TransformerCase(dim=24, ffn_dim=32, num_heads=2, text_len=4, text_dim=8, latents=(1, 4, 4, 16))
}

# Speaks the same lines as cpu_diffusers --serve, without torch.
_FAKE = """
import sys, time
from benchmarks.speed.cpu_cases import serve
serve(lambda case: lambda: time.sleep(0.002), {"name": "fake", "versions": {}}, sys.stdin, sys.stdout)
"""


def _fake_other() -> cpu.Other:
    return cpu.Other([sys.executable, "-c", _FAKE])


@pytest.mark.slow
def test_the_sides_take_turns_and_both_are_summarised():
    other = _fake_other()
    try:
        results = cpu.compare([cpu.Ours(_TINY), other], ["dit"], rounds=2)
    finally:
        other.close()
    assert list(results["dit"]) == ["x2v-jax", "fake"]
    assert all(len(timed["runs"]) == 2 and timed["seconds"] > 0 for timed in results["dit"].values())


def test_another_side_that_dies_ends_the_run_with_a_sentence():
    with pytest.raises(SystemExit, match="exit code 3"):
        cpu.Other([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_table_divides_ours_by_the_other():
    times = {"runs": [], "cpu_seconds": 1.0}
    text = cpu.table({"vae": {"x2v-jax": {"seconds": 3.0, **times}, "diffusers": {"seconds": 4.0, **times}}})
    assert text.splitlines()[2].split() == ["vae", "diffusers", "4.000", "1.000", "0.75"]


def test_timings_taken_earlier_stand_beside_ours(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(cpu, "compare", lambda sides, cases, rounds: {case: {"x2v-jax": _times(1.0)} for case in cases})
    other, output = tmp_path / "other.json", tmp_path / "results" / "cpu.json"
    other.write_text(json.dumps({"name": "diffusers", "versions": {"torch": "2"}, "cases": {"vae": _times(2.0)}}))
    assert cpu.main(["--cases", "vae", "--other", str(other), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["results"]["vae"]["diffusers"]["seconds"] == 2.0
    assert not report["same_run"] and report["machine"]["cores"] >= 1
    assert [side["name"] for side in report["sides"]] == ["x2v-jax", "diffusers"]
    assert "0.50" in capsys.readouterr().out


def test_a_worker_answers_each_line():
    answers, ran = io.StringIO(), []
    orders = [{"load": "dit"}, {"run": "dit"}, {"drop": "dit"}]
    lines = io.StringIO("".join(json.dumps(order) + "\n" for order in orders))
    cpu_cases.serve(lambda case: lambda: ran.append(case), {"name": "x"}, lines, answers)
    about, loaded, run, dropped = map(json.loads, answers.getvalue().splitlines())
    assert (about, loaded, dropped) == ({"name": "x"}, {}, {})
    assert run["seconds"] >= 0 and ran == ["dit", "dit"]  # once to warm up


def _times(seconds: float) -> dict:
    return {"seconds": seconds, "cpu_seconds": seconds, "runs": [seconds]}
