"""Draws what trainings measured while they ran: prompt accuracy and losses over the steps.

    python -m benchmarks.tiny_world.training_curves runs/shapes_t2v_dmd runs/shapes_causvid --out outputs/curves.png

Reads the log.jsonl of run directories, or such files themselves.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from x2v_jax import shipped
from x2v_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world.training_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories or their log.jsonl")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs/curves.png"))
    args = parser.parse_args(argv)
    try:
        logs = {_name(run): read_log(run) for run in args.runs}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.out, logs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def read_log(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's log.

    Raises:
        UserError: there is none, or it is no log.
    """
    file = run / "log.jsonl" if run.is_dir() else run
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is no log of a training ({error}); give run directories of `{shipped.command('train')}`"
        ) from None


def draw(path: pathlib.Path, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Accuracy on the left, losses of generator and critic (or of the one role) on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(logs.items()):
        colour = f"C{number}"
        measured = [line for line in lines if "eval/all" in line]
        left.plot(
            [m["step"] for m in measured], [100 * m["eval/all"] for m in measured], marker="o", label=name, color=colour
        )
        for loss, style in (("generator/loss", "-"), ("critic/loss", ":"), ("loss", "-")):
            points = [line for line in lines if loss in line]
            if points:
                label = f"{name}, {loss.split('/')[0]}" if "/" in loss else name
                right.plot(
                    [p["step"] for p in points], [p[loss] for p in points], style, lw=1, label=label, color=colour
                )
    left.set(title="unseen prompts all right, %", xlabel="step", ylim=(0, 102))
    right.set(title="loss", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _name(run: pathlib.Path) -> str:
    return run.stem if run.is_file() else run.name


if __name__ == "__main__":
    sys.exit(main())
