"""The command line of `python -m train.prepare`. Imports nothing heavy: help and mistakes answer at once."""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from x2v_jax import shipped
from x2v_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what there is")


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    parser = _Parser(
        prog=shipped.command("prepare"),
        description="Makes the data that training reads. An interrupted command goes on when it is given again.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prompts(commands)
    _add_videos(commands)
    _add_images(commands)
    _add_lmdb(commands)
    check = commands.add_parser("check", help="look for damage in what the other commands made, or in an LMDB")
    check.add_argument("path", metavar="PATH")
    return parser, commands.choices


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: it is not understood.
    """
    return make_parser()[0].parse_args(arguments)


def _add_prompts(commands: Any) -> None:
    prompts = commands.add_parser("prompts", help="encode prompts with a checkpoint's text encoder")
    _add_places(prompts, "file of prompts, a line each or JSONL (- for stdin), folder of .txt files, or a cache")
    prompts.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the checkpoint's)")
    prompts.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is stored")
    _add_compute(prompts)
    prompts.add_argument("--batch", type=_count, default=16, metavar="N", help="prompts encoded together (16)")
    prompts.add_argument("--skip-blank", action="store_true", help="leave out blank files and captions")


def _add_videos(commands: Any) -> None:
    videos = commands.add_parser("videos", help="encode videos with a checkpoint's VAE")
    _add_places(videos, "folder of videos with NAME.txt beside each, or a .json or .jsonl list of video and caption")
    _add_size(videos)
    videos.add_argument("--fps", type=float, help="frames a second of the clips (default: the checkpoint's)")
    _add_stored(videos)


def _add_images(commands: Any) -> None:
    images = commands.add_parser("images", help="encode first frames with a checkpoint's CLIP and VAE")
    _add_places(images, "folder of pictures with NAME.txt beside each, or a .json or .jsonl list of image and caption")
    _add_size(images)
    _add_compute(images)
    _add_stored(images)


def _add_lmdb(commands: Any) -> None:
    lmdb = commands.add_parser("lmdb", help="import a CausVid or Self-Forcing LMDB")
    lmdb.add_argument("source", metavar="SRC", help="folder of a data.mdb, or folder of such folders")
    lmdb.add_argument("destination", metavar="DST", help="folder to make")
    lmdb.add_argument("--timesteps", type=_numbers, metavar="T,T,…,0", help="of the states of trajectories")
    lmdb.add_argument("--images", metavar="FOLDER", help="also write the first frames as PNG with captions.jsonl")


def _add_places(parser: Any, source: str) -> None:
    parser.add_argument("source", metavar="SRC", help=source)
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="converted checkpoint with the networks")


def _add_size(parser: Any) -> None:
    for name in ("height", "width", "num-frames"):
        parser.add_argument(f"--{name}", type=_count, metavar="N", help="default: the checkpoint's")


def _add_compute(parser: Any) -> None:
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16", help="of matmuls")


def _add_stored(parser: Any) -> None:
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, with a warning")


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1000,757,522,0") from None
