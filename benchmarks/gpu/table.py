"""The report as text and as the tables of docs/performance.md. A number that was not measured is an empty cell."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import ROOT
from benchmarks.reports import replace_part

COMMITTED = ROOT / "benchmarks" / "results" / "gpu.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PART = "gpu"
NOTHING_MEASURED = (
    "No Hopper GPU was at hand so far: nothing here has been measured, and the cells stay empty until "
    "`python -m benchmarks.gpu all --quick` and `python -m benchmarks.gpu table --write` have run on one."
)

Row = Mapping[str, Any]
Report = Mapping[str, Any]


def main(out: pathlib.Path, *, write: bool) -> int:
    """Prints the tables of the newest report; with `write`, it becomes the committed one and goes into the document."""
    new = out / "gpu.json"
    path = new if new.exists() else COMMITTED
    report: Report = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    print(text(report) if report["sections"] else NOTHING_MEASURED)
    if not write:
        return 0
    fit, why = is_publishable(report)
    if not fit:
        print(f"error: {path} is not published: {why}", file=sys.stderr)
        return 2
    if path == new:
        COMMITTED.write_text(new.read_text())
    DOCUMENT.write_text(replace_part(DOCUMENT.read_text(), PART, markdown(report)))
    return 0


def is_publishable(report: Report) -> tuple[bool, str]:
    """Whether all of a report is of full size and from a GPU; and what is not."""
    for name, section in report["sections"].items():
        if section["tiny"]:
            return False, f"section {name} is of tiny sizes"
        if section["about"]["platform"] not in ("gpu", "cuda"):
            return False, f"section {name} ran on {section['about']['device']}"
    return True, ""


def text(report: Report) -> str:
    """Every section as aligned columns."""
    lines = []
    for name, section in report["sections"].items():
        lines += ["", f"{name} ({section['about']['device']})"]
        shown = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in section["rows"]]
        columns = list(dict.fromkeys(key for row in shown for key in row if key != "failed"))
        cells = [[_cell(key, row.get(key)) for key in columns] for row in shown]
        widths = [max(len(x) for x in column) for column in zip(columns, *cells, strict=True)]
        lines.append("  ".join(key.ljust(width) for key, width in zip(columns, widths, strict=True)))
        for row, values in zip(shown, cells, strict=True):
            failed = f"  FAILED {row['failed']}" if "failed" in row else ""
            lines.append("  ".join(v.ljust(width) for v, width in zip(values, widths, strict=True)) + failed)
        if "failed" in section:
            lines.append(f"FAILED {section['failed']}")
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The aims with what was measured beside them, and the parts of the runs."""
    rows = ["| what | aim | reference point | measured |", "|---|---|---|---|"]
    rows += [f"| {what} | {aim} | {point} | {measured(report)} |" for what, aim, point, measured in AIMS]
    if not report["sections"]:
        return "\n".join([NOTHING_MEASURED, "", *rows])
    about = next(iter(report["sections"].values()))["about"]
    smi = about.get("nvidia_smi") or {}
    clocks = f", {smi['clocks.max.sm']} at most, driver {smi['driver_version']}" if smi else ""
    versions = about["versions"]
    where = f"{about['device']}{clocks}, jax {versions.get('jax')}, {about['date'][:10]}, commit {about['commit']}"
    return "\n".join([f"Measured on {where}.", "", *rows, *_parts(report)])


def _parts(report: Report) -> Iterator[str]:
    """The runs of the models, part by part: seconds."""
    runs = {
        name: s["rows"]
        for name, s in report["sections"].items()
        if any("variant" in r and "part" in r for r in s["rows"])
    }
    names = list(dict.fromkeys(row["part"] for rows in runs.values() for row in rows))
    if not runs:
        return
    yield from ("", f"| seconds | {' | '.join(names)} | compiling | peak memory |", "|---" * (len(names) + 3) + "|")
    for rows in runs.values():
        by_part = {row["part"]: row for row in rows}
        last = by_part.get("end to end", {})
        cells = [_number(by_part.get(name, {}).get("seconds")) for name in names]
        first = rows[0]
        yield (
            f"| {first['model']} {first['size']} {first['variant']} | {' | '.join(cells)} | "
            f"{_number(last.get('compile_seconds'))} | {_gigabytes(last.get('peak_bytes'))} |"
        )


def _find(report: Report, section: str, **fields: Any) -> Row:
    """The row of a section that has these values; an empty one where there is none, or it failed."""
    rows = report["sections"].get(section, {}).get("rows", [])
    return next((r for r in rows if "failed" not in r and all(r.get(k) == v for k, v in fields.items())), {})


def _attention(report: Report) -> str:
    found = []
    for case in ("14B 480P", "14B 720P"):
        ours, theirs = (
            _find(report, "attention", case=case, implementation=i, precision="full").get("flops_a_second")
            for i in ("hopper", "cudnn")
        )
        if ours or theirs:
            found.append(f"{case}: ours {_tera(ours)}, cuDNN {_tera(theirs)}")
    return "; ".join(found)


def _low_attention(report: Report) -> str:
    found = []
    for case in ("14B 480P", "14B 720P"):
        base = _find(report, "attention", case=case, implementation="cudnn", precision="full").get("seconds")
        for precision in ("int8", "e4m3", "int8_e4m3", "e4m3_all"):
            row = _find(report, "attention", case=case, implementation="hopper", precision=precision)
            if row and base:
                found.append(f"{case} {precision}: {base / row['seconds']:.2f} x, error {row['relative_error']}")
    return "; ".join(found)


def _linear(report: Report) -> str:
    ratios: dict[str, list[float]] = {"bf16": [], "int8": []}
    cases = dict.fromkeys(row["case"] for row in report["sections"].get("linear", {}).get("rows", []))
    for case in cases:
        ours = _find(report, "linear", case=case, implementation="hopper", dtype="int8").get("seconds")
        for name, dtype in (("bf16", "bfloat16"), ("int8", "int8")):
            theirs = _find(report, "linear", case=case, implementation="xla", dtype=dtype).get("seconds")
            if ours and theirs:
                ratios[name].append(theirs / ours)
    return "; ".join(
        f"{min(found):.2f} to {max(found):.2f} x XLA {name} over {len(found)} shapes"
        for name, found in ratios.items()
        if found
    )


def _run(section: str) -> Callable[[Report], str]:
    def measured(report: Report) -> str:
        found = []
        for variant in ("int8", "fp8", "bf16"):
            row = _find(report, f"{section}_{variant}", part="end to end")
            if row:
                found.append(f"{variant} {_number(row['seconds'])} s, {_gigabytes(row['peak_bytes'])}")
        return "; ".join(found)

    return measured


def _vae(report: Report) -> str:
    found = {}
    for section in ("i2v_14b_480p_int8", "t2v_1_3b_480p_int8", "i2v_14b_480p_bf16", "t2v_1_3b_480p_bf16"):
        row = _find(report, section, part="VAE decode")
        if row:
            found.setdefault(row["vae_dtype"], f"{row['vae_dtype']} {_number(row['seconds'])} s")
    return "; ".join(found.values())


def _start(report: Report) -> str:
    load, warm = _find(report, "loading", case="from the disk"), _find(report, "warm_start", part="end to end")
    found = [f"{load['bytes_a_second'] / 1e9:.2f} GB/s, of 1.3B"] if load else []
    found += [f"compile {_number(warm['compile_seconds'])} s"] if warm else []
    return "; ".join(found)


def _stream(section: str) -> Callable[[Report], str]:
    def measured(report: Report) -> str:
        rows = report["sections"].get(section, {}).get("rows", [])
        return "; ".join(
            f"{row['variant']} {row['frames_a_second']:.1f} frames/s, first after {row['first_frame_seconds']:.2f} s"
            for row in rows
            if "failed" not in row
        )

    return measured


def _step(section: str) -> Callable[[Report], str]:
    def measured(report: Report) -> str:
        row = _find(report, section, part="step")
        return f"{_number(row['seconds'])} s, {_gigabytes(row['peak_bytes'])}" if row else ""

    return measured


AIMS: tuple[tuple[str, str, str, Callable[[Report], str]], ...] = (
    (
        "attention bf16, 32,760 x 40 x 128 and 75,600 x 40 x 128",
        "the better of ours and cuDNN",
        "cuDNN about 690 TFLOP/s on an H100 (published with tokamax)",
        _attention,
    ),
    (
        "attention, queries and keys in 8 bits / all in e4m3",
        "1.3 x / 1.5 x cuDNN bf16, relative error under 0.03 / 0.06",
        "",
        _low_attention,
    ),
    ("W8A8 linear, quantization of activations included", "1.6 x XLA bf16 and above XLA's int8 pattern", "", _linear),
    ("I2V-14B 480P, 4 steps, end to end", "8 s, 35 GB", "LightX2V 14 s, 35 GB (H200)", _run("i2v_14b_480p")),
    ("I2V-14B 720P, 4 steps, end to end", "27 s, 43 GB", "LightX2V 44 s, 43 GB (H200)", _run("i2v_14b_720p")),
    ("T2V-1.3B 480P, 4 steps, end to end", "2.5 s", "", _run("t2v_1_3b_480p")),
    ("VAE decode, 81 frames at 480P", "1.5 s", "", _vae),
    ("first video of I2V-14B, warm compilation cache", "load at 1.5 GB/s or more, compile under 10 s", "", _start),
    ("1.3B block by block, 480P", "", "", _stream("stream_1_3b")),
    ("14B block by block, 480P", "", "", _stream("stream_14b")),
    ("1.3B DMD, whole videos, a step of one sample", "", "", _step("training_dmd")),
    ("1.3B Self-Forcing, a step of one sample", "", "", _step("training_self_forcing")),
)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("flops_a_second") or key == "operations_a_second":
        return f"{value / 1e12:.1f}T"
    if key.endswith("bytes_a_second"):
        return f"{value / 1e9:.0f}G"
    if key == "peak_bytes":
        return _gigabytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f} GB"


def _tera(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e12:.0f} TFLOP/s"
