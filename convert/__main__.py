"""python -m convert wan|inspect|export|extract-lora|calibrate: parse, call, report."""

import sys

from x2v_jax.cli import streams
from x2v_jax.cli.interrupts import exit_on_sigterm
from x2v_jax.errors import UserError

from .arguments import options, parse
from .progress import interrupted, run


def main(arguments: list[str] | None = None) -> int:
    exit_on_sigterm()
    destination = None
    try:
        args = parse(arguments)
        destination = getattr(args, "destination", None)
        if args.command == "inspect":
            from .describe import describe

            describe(args)
        elif args.command == "wan":
            from x2v_jax.checkpoint.conversion.convert import convert

            from .next_command import next_command

            work = lambda progress: convert(args.source, args.destination, options(args), progress)  # noqa: E731
            run(work, args.destination, next_command)
        elif args.command == "extract-lora":
            from .extract import extract_lora

            extract_lora(args)
        elif args.command == "calibrate":
            from .calibrate import calibrate

            calibrate(args)
        else:
            from x2v_jax.checkpoint.published.export import export

            run(lambda progress: export(args.checkpoint, args.destination, args.layout, progress), args.destination)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted(destination), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(streams.run(main))
