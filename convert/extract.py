"""`python -m convert extract-lora`: the difference of two checkpoints as a LoRA, with an account of what it keeps."""

import argparse
import json
import pathlib

from x2v_jax.checkpoint import lora_extract
from x2v_jax.checkpoint.complete_file import complete_file
from x2v_jax.checkpoint.store import open_checkpoint


def extract_lora(args: argparse.Namespace) -> None:
    """Runs the parsed command and prints the account.

    Raises:
        UserError: the checkpoints do not fit each other, or a file cannot be written.
    """
    from tqdm import tqdm

    base, distilled = open_checkpoint(args.base), open_checkpoint(args.distilled)
    with tqdm(unit="parameter", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = lora_extract.extract_lora(
            base,
            distilled,
            args.destination,
            rank=args.rank,
            dialect=args.dialect,
            dtype=args.dtype,
            progress=progress,
        )
    print(report)
    if args.report:
        data = (json.dumps(report.to_json(), indent=1) + "\n").encode()
        with complete_file(pathlib.Path(args.report), len(data)) as file:
            file.write_at(0, data)
    print(f"wrote {args.destination}")
