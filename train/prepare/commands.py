"""What each command of `python -m train.prepare` does."""

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint

Progress = Callable[[int, int], None]


def run(args: argparse.Namespace) -> int:
    """Runs a parsed command and prints what became of it. Returns the exit code.

    Raises:
        UserError: a mistake of the user's.
    """
    return {"prompts": _prompts, "videos": _videos, "images": _images, "lmdb": _lmdb, "check": _check}[args.command](
        args
    )


def _prompts(args: argparse.Namespace) -> int:
    from ..data.prompts import make_prompt_cache, read_prompts

    prompts, notes = read_prompts(args.source, skip_blank=args.skip_blank)
    _print_notes(notes)
    checkpoint = open_checkpoint(args.checkpoint)
    with _bar("prompt") as progress:
        cache = make_prompt_cache(
            args.destination,
            prompts,
            checkpoint,
            negative_prompt=args.negative,
            dtype=args.dtype,
            compute=args.compute,
            batch_size=args.batch,
            progress=progress,
        )
    print(f"wrote {args.destination}: {len(cache)} prompts, {cache.text_len} x {cache.dim}")
    return 0


def _videos(args: argparse.Namespace) -> int:
    from ..data.items import read_items
    from ..data.latents import make_latent_cache

    videos = read_items(args.source, "video")
    checkpoint = open_checkpoint(args.checkpoint)
    with _bar("video") as progress:
        cache = make_latent_cache(
            args.destination,
            videos,
            checkpoint,
            **_size(args, checkpoint),
            fps=args.fps or checkpoint.schedule.fps,
            dtype=args.dtype,
            skip_bad=args.skip_bad,
            progress=progress,
        )
    print(f"wrote {args.destination}: {len(cache)} videos, latents of {cache.latent_size}")
    return 0


def _images(args: argparse.Namespace) -> int:
    from ..data.images import make_image_cache
    from ..data.items import read_items

    images = read_items(args.source, "image")
    checkpoint = open_checkpoint(args.checkpoint)
    with _bar("image") as progress:
        cache = make_image_cache(
            args.destination,
            images,
            checkpoint,
            **_size(args, checkpoint),
            dtype=args.dtype,
            compute=args.compute,
            skip_bad=args.skip_bad,
            progress=progress,
        )
    print(f"wrote {args.destination}: {len(cache)} pictures, latents of {cache.latent_size}")
    return 0


def _lmdb(args: argparse.Namespace) -> int:
    from ..data.lmdb_file import LmdbData
    from ..data.lmdb_import import extract_images, import_lmdb

    data = LmdbData(args.source)
    with _bar("row") as progress:
        cache = import_lmdb(args.destination, data, timesteps=args.timesteps, progress=progress)
    print(f"wrote {args.destination}: {len(cache)} rows, latents of {cache.latent_size}")
    if args.images:
        with _bar("image") as progress:
            captions = extract_images(args.images, data, progress)
        print(f"wrote {captions}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from ..data.check import check

    with _bar("part") as progress:
        report = check(args.path, progress)
    print(report)
    return 1 if report.problems else 0


def _size(args: argparse.Namespace, checkpoint: NativeCheckpoint) -> dict[str, Any]:
    names = ("height", "width", "num_frames")
    return {name: getattr(args, name) or getattr(checkpoint.schedule, name) for name in names}


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Progress]:
    """A progress bar that also keeps warnings from tearing it."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=None) as bar, warnings.catch_warnings():
        # Every file that is left out gets its line, also where two say the same.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: bar.write(f"warning: {message}")

        def progress(done: int, total: int) -> None:
            bar.total = total
            if not bar.n and done:
                bar.initial = done  # so that what an earlier run made does not count as speed
            bar.update(done - bar.n)

        yield progress
