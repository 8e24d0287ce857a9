"""python -m convert wan|inspect|export|extract-lora|calibrate: parse, call, report."""

import os
import signal
import sys
from collections.abc import Callable

from convert.arguments import options, parse
from x2v_jax.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    # A polite kill unwinds the stack, so that unfinished output is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    destination = None
    try:
        args = parse(arguments)
        destination = getattr(args, "destination", None)
        if args.command == "inspect":
            from convert.describe import describe

            describe(args)
        elif args.command == "wan":
            from x2v_jax.checkpoint.convert import convert

            _run(lambda progress: convert(args.source, args.destination, options(args), progress), args.destination)
        elif args.command == "extract-lora":
            from convert.extract import extract_lora

            extract_lora(args)
        elif args.command == "calibrate":
            from convert.calibrate import calibrate

            calibrate(args)
        else:
            from x2v_jax.checkpoint.export import export

            _run(lambda progress: export(args.checkpoint, args.destination, args.layout, progress), args.destination)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        is_there = destination is not None and os.path.exists(destination)
        left = f"{destination} is complete, or as it was" if is_there else "nothing is left at the destination"
        print(f"interrupted; {left}", file=sys.stderr)
        return 130


def _run(work: Callable[..., tuple[str, ...]], destination: str) -> None:
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        notes = work(progress)
    print("\n".join([*(f"note: {note}" for note in notes), f"wrote {destination}"]))


if __name__ == "__main__":
    sys.exit(main())
