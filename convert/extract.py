"""`python -m convert extract-lora`: the difference of two checkpoints as a LoRA, with an account of what it keeps."""

import argparse
import json
import pathlib

from x2v_jax.checkpoint.files.atomic import complete_file
from x2v_jax.checkpoint.lora import extract
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError


def extract_lora(args: argparse.Namespace) -> None:
    """Runs the parsed command and prints the account.

    Raises:
        UserError: the checkpoints do not fit each other, or a file exists or cannot be written.
    """
    from tqdm import tqdm

    report_file = pathlib.Path(args.report) if args.report else None
    if report_file is not None and report_file.is_file() and not args.overwrite:
        raise UserError(f"--report {report_file} exists; choose another name or give --overwrite")
    base, distilled = open_checkpoint(args.base), open_checkpoint(args.distilled)
    with tqdm(unit="parameter", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = extract.extract_lora(
            base,
            distilled,
            args.destination,
            rank=args.rank,
            dialect=args.dialect,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(report)
    if report_file is not None:
        data = (json.dumps(report.to_json(), indent=1) + "\n").encode()
        with complete_file(report_file, len(data)) as file:
            file.write_at(0, data)
    print(f"wrote {args.destination}")
