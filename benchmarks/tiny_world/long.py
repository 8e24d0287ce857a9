"""Measures how a causal model of the tiny world holds out over many times its trained horizon.

    python -m benchmarks.tiny_world.long --checkpoint assets/shapes_causal --horizons 10

A shape of this world cannot move in one direction for long: it would leave the picture, which training never shows. So
the prompt changes at every horizon (33 frames) to the opposite direction, and the judge asks of each horizon whether
colour, shape and direction are right. How far colours and background drift from the first horizon's is measured beside
it, for every way to go on. A JSON file, a plot and a contact sheet go to --out.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.reports import circumstances
from x2v_jax.errors import UserError

MODES = ("sliding", "fragments", "full")


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        report = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


def measure(args: Any) -> dict[str, Any]:
    """Rolls out every mode and prints the table of accuracies by horizon."""
    from benchmarks.tiny_world.long_rollout import LongModel
    from benchmarks.tiny_world.report import frames_sheet, plot_horizons
    from train.shapes.world import heldout_prompts

    prompts = heldout_prompts(args.prompts, args.seed)
    turned = [turn(prompt) for prompt in prompts]
    model = LongModel(args.checkpoint, args.dtype)
    report: dict[str, Any] = {
        **circumstances("benchmarks.tiny_world.long", args.given), "horizons": args.horizons, "modes": {},
    }  # fmt: skip
    shown = {}
    for mode in args.modes:
        found = model.roll_out(mode, prompts, turned, args.horizons, args.seed, args.batch)
        report["modes"][mode] = found.summary(prompts, turned)
        shown[mode] = found.samples
        accuracy = report["modes"][mode]["accuracy"]
        print(f"{mode:10s} " + " ".join(f"{100 * a:5.1f}" for a in accuracy) + "  % all right, by horizon", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_horizons(args.out.with_suffix(".png"), report["modes"])
    frames_sheet(args.out.with_name(f"{args.out.stem}_frames.png"), shown)
    return report


def turn(prompt: Any) -> Any:
    """The prompt with the opposite direction, in the canonical wording."""
    from train.shapes.world import DIRECTIONS, OPPOSITE, turned

    direction = OPPOSITE[DIRECTIONS[prompt.direction]]
    return prompt._replace(text=turned(prompt.text), direction=DIRECTIONS.index(direction))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world.long",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("assets/shapes_causal"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--horizons", type=int, default=10, help="lengths of 33 frames (default 10)")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=24, help="videos made together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs/shapes_long.json"))
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    return args


if __name__ == "__main__":
    sys.exit(main())
