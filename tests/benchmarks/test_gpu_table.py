"""The tables of docs/performance.md: what was measured, and nothing else."""

import json
import pathlib
from typing import Any

import pytest

from benchmarks.gpu import table
from benchmarks.reports import NoSuchPart, part, replace_part

ABOUT = {
    "platform": "gpu",
    "device": "NVIDIA H200",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "nvidia_smi": {"clocks.max.sm": "1980 MHz", "driver_version": "580"},
    "versions": {"jax": "0.11.2"},
}


def _report(platform: str = "gpu", tiny: bool = False, **rows: list[dict[str, Any]]) -> dict[str, Any]:
    about = {**ABOUT, "platform": platform}
    return {"sections": {name: {"about": about, "tiny": tiny, "rows": found} for name, found in rows.items()}}


def _cells(text: str, what: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {what}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_report_every_measured_cell_is_empty_and_a_sentence_says_why():
    text = table.markdown({"sections": {}})
    assert text.startswith("No Hopper GPU was at hand")
    for what, aim, *_ in table.AIMS:
        assert _cells(text, what)[1] == aim
        assert _cells(text, what)[-1] == ""


def test_ratios_need_both_sides_and_failed_rows_do_not_count():
    base = {"case": "14B 480P", "implementation": "cudnn", "precision": "full", "seconds": 2.0, "flops_a_second": 6e14}
    ours = {"case": "14B 480P", "implementation": "hopper", "precision": "int8", "seconds": 1.5, "relative_error": 0.02}
    wrong = {**ours, "precision": "e4m3", "failed": "Wrong: relative error 0.5"}
    text = table.markdown(_report(attention=[base, ours, wrong]))
    assert _cells(text, "attention, queries and keys")[-1] == "14B 480P int8: 1.33 x, error 0.02"
    assert "Measured on NVIDIA H200, 1980 MHz at most, driver 580, jax 0.11.2, 2026-01-02, commit abc." in text
    assert _cells(table.markdown(_report(attention=[ours])), "attention, queries and keys")[-1] == ""


def test_parts_of_a_run_stand_side_by_side():
    about = {"model": "I2V-14B", "size": "480P", "variant": "int8"}
    rows = [
        {**about, "part": "text", "seconds": 0.05, "compile_seconds": 3.0},
        {**about, "part": "end to end", "seconds": 7.5, "compile_seconds": 20.0, "peak_bytes": 33e9},
    ]
    text = table.markdown(_report(i2v_14b_480p_int8=rows))
    assert "| I2V-14B 480P int8 | 0.05 | 7.5 | 20 | 33.0 GB |" in text
    assert _cells(text, "I2V-14B 480P, 4 steps")[-1] == "int8 7.5 s, 33.0 GB"


@pytest.mark.parametrize("report", [_report("cpu", ceilings=[]), _report(tiny=True, ceilings=[])])
def test_numbers_of_a_cpu_or_of_tiny_sizes_are_not_published(report, tmp_path: pathlib.Path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    document = tmp_path / "performance.md"
    document.write_text("untouched")
    monkeypatch.setattr(table, "DOCUMENT", document)
    assert table.main(tmp_path, write=True) == 2
    assert "is not published" in capsys.readouterr().err
    assert document.read_text() == "untouched"


def test_a_report_becomes_the_committed_one_and_goes_into_the_document(tmp_path: pathlib.Path, monkeypatch):
    report = _report(loading=[{"case": "from the disk", "bytes_a_second": 2.5e9}])
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- begin gpu -->\nold\n<!-- end gpu -->\nafter\n")
    monkeypatch.setattr(table, "DOCUMENT", document)
    monkeypatch.setattr(table, "COMMITTED", tmp_path / "committed.json")
    assert table.main(tmp_path, write=True) == 0
    assert json.loads((tmp_path / "committed.json").read_text()) == report
    assert "2.50 GB/s, of 1.3B" in document.read_text() and "old" not in document.read_text()
    assert document.read_text().startswith("before\n") and document.read_text().endswith("\nafter\n")


def test_the_document_says_what_the_committed_report_says():
    report = json.loads(table.COMMITTED.read_text()) if table.COMMITTED.exists() else {"sections": {}}
    assert part(table.DOCUMENT.read_text(), table.PART) == table.markdown(report)


def test_a_document_without_the_part_is_an_error():
    with pytest.raises(NoSuchPart, match="begin gpu"):
        replace_part("no comments", "gpu", "x")


def test_text_shows_failures_with_their_row():
    rows = [{"case": "a", "seconds": 0.5, "flops_a_second": 6.9e14}, {"case": "b", "failed": "Wrong: no"}]
    text = table.text(_report(attention=rows))
    assert "690.0T" in text and "FAILED Wrong: no" in text
