"""What low precision costs, float32 as truth: of each operation, and of whole videos of the tiny world. On a CPU.

    python -m benchmarks.errors.table --prompts 200

8-bit operations are computed by their references, which round as the kernels do. Operations: relative error (L2) on
what the trained tiny model gives them while it samples, and on random numbers with tails. Videos: decibels against the
video of the same noise in float32, and how often colour, shape and direction are what the prompt says. Writes the
numbers, a plot, and with --document the tables of docs/performance.md. Takes half an hour on two idle cores.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import ROOT
from benchmarks.reports import circumstances, replace_part

DEFAULT_OUTPUT = ROOT / "benchmarks" / "results" / "error_table.json"
PLOT = ROOT / "docs" / "images" / "error_table.png"
DOCUMENT = ROOT / "docs" / "performance.md"
OPERATIONS_PART, VIDEOS_PART = "error table, operations", "error table, videos"
# Share of videos by which a variant may be below bfloat16.
ALLOWED_LOSS = 0.01
_RECORDED_PROMPTS = 2

Row = Mapping[str, Any]
_PUBLISHED_PROMPTS = 200


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.errors.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("assets/shapes_t2v_4step"))
    parser.add_argument("--prompts", type=int, default=_PUBLISHED_PROMPTS, help="0: operations alone")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="of the videos; rows of others stay as they are (all)"
    )
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--output", type=pathlib.Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--document", action="store_true", help="put plot and tables into docs/")
    options = parser.parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    report = measure(options, given)
    _write(options.output, report)
    for part in (operations_table(report["operations"]), videos_table(report["videos"])):
        print(part, end="\n\n")
    if options.document:
        plot(report["operations"], PLOT)
        document = replace_part(DOCUMENT.read_text(), OPERATIONS_PART, operations_table(report["operations"]))
        DOCUMENT.write_text(replace_part(document, VIDEOS_PART, videos_table(report["videos"])))
    lost = too_inaccurate(report["videos"])
    for sentence in lost:
        print(sentence, file=sys.stderr)
    return 1 if lost else 0


def measure(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """The report; it is written after every video row, since they take long."""
    from benchmarks.errors.ops import operation_rows
    from benchmarks.errors.record import calibrated, kept_rows, record_sampling
    from benchmarks.errors.videos import VARIANTS, video_rows
    from train.shapes.world import heldout_prompts
    from x2v_jax.checkpoint.native.reader import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint)
    prompts = [prompt.text for prompt in heldout_prompts(_RECORDED_PROMPTS, options.seed)]
    report: dict[str, Any] = {**circumstances("benchmarks.errors.table", given), "checkpoint": str(options.checkpoint)}
    # However many are asked for, the calibration is the same.
    measured = [prompt.text for prompt in heldout_prompts(max(options.prompts, _PUBLISHED_PROMPTS), options.seed)]
    # Of another seed, and none of the prompts that errors are measured on.
    calibration = calibrated(checkpoint, options.seed + 1, (*prompts, *measured))
    report["calibration"] = dict(calibration.about) | {"config": "of the checkpoint"}
    rows = list(operation_rows(record_sampling(checkpoint, prompts), calibration))
    earlier = json.loads(options.output.read_text()) if options.output.is_file() else {"videos": []}
    report |= {"operations": rows, "videos": earlier["videos"]}
    if options.prompts:
        variants = options.variants or tuple(VARIANTS)
        kept = kept_rows(earlier, (*variants, "float32"), options.prompts) if options.variants else []
        done: list[Row] = []
        order = list(VARIANTS)
        for row in video_rows(checkpoint, options.prompts, options.seed, options.batch, variants, calibration):
            done.append(row)
            report["videos"] = sorted([*kept, *done], key=lambda row: order.index(row["variant"]))
            print(f"{row['variant']}: {row['all']:.1%} right", file=sys.stderr, flush=True)
            _write(options.output, report)
    return report


def too_inaccurate(rows: Sequence[Row]) -> list[str]:
    """Sentences on variants that are more than a point below bfloat16."""
    base = next((row["all"] for row in rows if row["variant"] == "bfloat16"), None)
    return [
        f"{row['variant']}: {row['all']:.1%} right, bfloat16 {base:.1%}"
        for row in rows
        if base is not None and row["all"] < base - ALLOWED_LOSS - 1e-9
    ]


def operations_table(rows: Sequence[Row]) -> str:
    """Markdown: the median over the cases, and behind a slash the worst where there are several."""
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    found = {(row["operation"], row["precision"], row["data"]): row for row in rows}
    lines = [f"| relative error | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for operation, precision in dict.fromkeys((row["operation"], row["precision"]) for row in rows):
        cells = [_error(found.get((operation, precision, kind))) for kind in kinds]
        lines.append(f"| {operation}, {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def videos_table(rows: Sequence[Row]) -> str:
    lines = ["| transformer | right, of all | 95 % interval | PSNR, median | PSNR, worst |", "|---|---|---|---|---|"]
    for row in rows:
        decibels = [f"{row[key]:.1f} dB" if key in row else "" for key in ("psnr", "psnr_worst")]
        interval = f"{row['all_low']:.1%} – {row['all_high']:.1%}"
        lines.append(f"| {row['variant']} | {row['all']:.1%} of {row['n']} | {interval} | {' | '.join(decibels)} |")
    return "\n".join(lines)


def _error(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['median']:.2%}" + (f" / {row['worst']:.2%}" if row["cases"] > 1 else "")


def _write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A PNG: one panel an operation, one group of bars a precision, one bar a kind of data, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(row["operation"] for row in rows))
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    # Bars are as wide in every panel.
    widths = [len({row["precision"] for row in rows if row["operation"] == operation}) for operation in operations]
    figure, panels = pyplot.subplots(
        1, len(operations), figsize=(14, 4.2), sharey=True, layout="constrained", squeeze=False, width_ratios=widths
    )
    width = 0.8 / len(kinds)
    for axes, operation in zip(panels[0], operations, strict=True):
        own = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(row["precision"] for row in own))
        for i, kind in enumerate(kinds):
            points = [(names.index(row["precision"]), row) for row in own if row["data"] == kind]
            places = [x + (i - (len(kinds) - 1) / 2) * width for x, _ in points]
            medians = [row["median"] for _, row in points]
            above = [row["worst"] - row["median"] for _, row in points]
            axes.bar(places, medians, width, yerr=[[0.0] * len(above), above], label=kind, color=f"C{i}", capsize=2)
        axes.set_xticks(
            range(len(names)), [name.replace(", ", "\n").replace(" only", "\nonly") for name in names], fontsize=8
        )
        axes.set(title=operation, yscale="log")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("relative error against float32")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
