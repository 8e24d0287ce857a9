"""`python -m convert inspect`: what a path holds, or (--layers, --against) what became of each 8-bit matrix of it."""

import argparse
import dataclasses
import json
import sys


def describe(args: argparse.Namespace) -> None:
    """Runs the parsed command.

    Raises:
        UserError: the path cannot be read; with --layers, nothing is 8-bit; with --against, the source does not fit.
    """
    if args.layers or args.against:
        _each_matrix(args)
        return
    from x2v_jax.checkpoint.conversion.inspect import inspect, to_text

    from .run_memory import COUNTED, phases

    found = inspect(args.path, phases)
    print(json.dumps(found.to_dict(), indent=2) if args.json else to_text(found, COUNTED))


def _each_matrix(args: argparse.Namespace) -> None:
    from x2v_jax.checkpoint.conversion.compare import against_notes
    from x2v_jax.checkpoint.conversion.quantization_report import quantization_report, summary

    if args.against:
        for note in against_notes(args.path, args.against):
            print(f"note: {note}", file=sys.stderr if args.json else sys.stdout)
    reports = []
    for report in quantization_report(args.path, args.against):
        reports.append(report)
        if not args.json:
            print(f"  {report}", flush=True)  # as it is read: a large model takes minutes
    if args.json:
        print(json.dumps([dataclasses.asdict(r) | {"decibels": r.decibels} for r in reports], indent=1))
    else:
        print("\n".join(summary(reports)))
