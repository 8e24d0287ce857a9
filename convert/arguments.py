"""The command line of `python -m convert`. Imports nothing heavy: help and mistakes answer at once."""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from x2v_jax import shipped
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS, QUANTIZABLE, VARIANTS

if TYPE_CHECKING:
    from x2v_jax.checkpoint.conversion.convert import ConversionOptions

DTYPES = ("keep", "float32", "bfloat16", "float16")
QUANTIZE = ("keep", "none", "int8", "fp8")
LAYOUTS = ("wan", "lightx2v", "diffusers")
LORA_DIALECTS = ("lightx2v", "comfyui", "diffusers")

# Arguments that are paths -> what the command line calls them.
_PATHS = {
    "source": "SRC",
    "destination": "DST",
    "checkpoint": "CKPT",
    "path": "PATH",
    "base": "BASE",
    "distilled": "DISTILLED",
    "smooth": "--smooth",
    "reuse": "--reuse",
    "against": "--against",
    "prompts": "--prompts",
    "images": "--images",
    "report": "--report",
}
# Those that name a checkpoint to read.
_READ = ("source", "checkpoint", "path", "base", "distilled", "reuse", "against")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what there is")


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    description = "Published Wan2.1 checkpoints to this project's and back."
    parser = _Parser(prog=shipped.command("convert"), description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_wan(commands)
    inspect = commands.add_parser("inspect", help="tell what a file or folder holds")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--layers", action="store_true", help="read 8-bit weights and tell of each matrix")
    inspect.add_argument(
        "--against", metavar="SRC", help="the same with the error of each, from its 16- or 32-bit source"
    )
    export = commands.add_parser("export", help="write a converted checkpoint back in a published layout, bit exact")
    export.add_argument("checkpoint", metavar="CKPT")
    export.add_argument("destination", metavar="DST")
    export.add_argument("--layout", required=True, choices=LAYOUTS)
    _add_extract_lora(commands)
    _add_calibrate(commands)
    return parser, commands.choices


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: it is not understood.
    """
    parser, _ = make_parser()
    args = parser.parse_args(arguments)
    args.given = sys.argv[1:] if arguments is None else arguments
    for name, shown in _PATHS.items():
        if getattr(args, name, None) == "":  # which would be taken for the folder that one is in
            raise UserError(f"{shown} is empty; give a file or folder")
    for name in _READ:  # a shipped checkpoint is found from every folder
        if getattr(args, name, None):
            setattr(args, name, shipped.locate(getattr(args, name)))
    return args


def _add_wan(commands: Any) -> None:
    wan = commands.add_parser(
        "wan",
        help="convert an official, LightX2V, diffusers or trainer's checkpoint",
        description="Converts a Wan2.1 checkpoint in any published layout: folder, single file, or shards. A converted "
        "one is taken too, to change its types or to merge LoRAs.",
    )
    wan.add_argument("source", metavar="SRC", help="folder or file")
    wan.add_argument("destination", metavar="DST", help="folder to make; it appears when it is complete")
    wan.add_argument("--variant", choices=VARIANTS, help="which transformer, where SRC holds several")
    wan.add_argument("--component", action="append", choices=COMPONENTS, default=[], help="only this one (repeatable)")
    wan.add_argument("--dtype", choices=DTYPES, default="keep", help="type of the weights (default: as they are)")
    wan.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="keep",
        help="bring the transformer's matrices to 8 bits; none multiplies 8-bit files out (default: as they are)",
    )
    wan.add_argument(
        "--quantize-component",
        action="append",
        choices=QUANTIZABLE,
        default=[],
        help="what --quantize means instead of the transformer alone (repeatable)",
    )
    wan.add_argument(
        "--smooth",
        metavar="CALIBRATION",
        help="with --quantize: first move unevenness of the activations, as `calibrate` recorded it, into the weights",
    )
    wan.add_argument(
        "--smooth-alpha", type=_share, metavar="A", help="how much of it: 0 (none of the activations' own) to 1 (0.5)"
    )
    wan.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", default=[], help="merge it in (repeatable)")
    wan.add_argument("--allow-partial", action="store_true", help="merge what fits of a LoRA and report the rest")
    wan.add_argument("--schedule", metavar="NAME|JSON|FILE", help="sampling settings, or fields of them as JSON")
    wan.add_argument("--reuse", metavar="CKPT", help="share text encoder, VAE and tokenizer of a converted checkpoint")
    form = "COMPONENT.FIELD=VALUE"
    wan.add_argument("--set", action="append", metavar=form, default=[], help="a size that no file tells (repeatable)")
    wan.add_argument("--allow-nonfinite", action="store_true", help="keep NaN and infinity in the weights")
    wan.add_argument("--overwrite", action="store_true", help="replace a converted checkpoint at DST")


def _add_extract_lora(commands: Any) -> None:
    extract = commands.add_parser(
        "extract-lora",
        help="write the difference of two converted checkpoints as a LoRA",
        description="Cuts the difference of two transformers to a rank by its singular values, layer by layer.",
    )
    extract.add_argument("base", metavar="BASE", help="converted checkpoint")
    extract.add_argument("distilled", metavar="DISTILLED", help="converted checkpoint of what was trained from it")
    extract.add_argument("destination", metavar="DST.safetensors")
    extract.add_argument("--rank", type=_rank, default=64, metavar="N", help="of each pair (64)")
    extract.add_argument("--dialect", choices=LORA_DIALECTS, default="lightx2v", help="who is to read it")
    extract.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16", help="type of the file's numbers")
    extract.add_argument("--report", metavar="FILE.json", help="write what was kept of every layer")
    extract.add_argument("--overwrite", action="store_true", help="replace the files that are there")


def _rank(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="record a transformer's activations while it makes videos, for `wan --smooth`",
        description="Makes a video of each prompt with the checkpoint's own sampler and writes, for the inputs that "
        "--smooth can make even, the largest magnitude of every channel in every layer.",
    )
    calibrate.add_argument("checkpoint", metavar="CKPT", help="converted checkpoint with 16- or 32-bit weights")
    calibrate.add_argument("destination", metavar="DST.safetensors")
    calibrate.add_argument("--prompts", required=True, metavar="FILE", help="text, one prompt a line")
    calibrate.add_argument(
        "--images",
        metavar="PATH",
        help="image-to-video: a picture, a folder of pictures, or a text file with the path of one a line; one a "
        "prompt in turn, from the first again where there are fewer",
    )
    calibrate.add_argument("--limit", type=_rank, metavar="N", help="take the first N prompts (all)")
    for name, what in (("height", "pixels"), ("width", "pixels"), ("num-frames", "frames")):
        calibrate.add_argument(f"--{name}", type=_rank, metavar="N", help=f"{what} (the checkpoint's)")
    calibrate.add_argument("--seed", type=int, default=0, help="of the first video; the next have the next (0)")
    calibrate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the run (bfloat16)")
    calibrate.add_argument(
        "--offload", choices=("none", "blocks"), default="none", help=f"as in `{shipped.command('infer')}`"
    )


def options(args: argparse.Namespace) -> "ConversionOptions":
    """The library's options for `wan`."""
    from x2v_jax.checkpoint.conversion.convert import ConversionOptions
    from x2v_jax.checkpoint.lora.arguments import parse_lora_argument

    return ConversionOptions(
        variant=args.variant,
        components=tuple(dict.fromkeys(args.component)),
        dtype=args.dtype,
        quantize=args.quantize,
        quantize_components=tuple(dict.fromkeys(args.quantize_component)),
        smooth=args.smooth,
        smooth_alpha=args.smooth_alpha,
        loras=tuple(parse_lora_argument(text) for text in args.lora),
        allow_partial=args.allow_partial,
        schedule=args.schedule,
        reuse=args.reuse,
        overwrite=args.overwrite,
        allow_nonfinite=args.allow_nonfinite,
        settings=settings(args.set),
        command=shipped.command(f"convert {shlex.join(args.given)}"),
    )


def settings(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """Reads `--set COMPONENT.FIELD=VALUE`.

    >>> settings(["image_encoder.num_heads=4"])
    {'image_encoder': {'num_heads': 4}}

    Raises:
        UserError: not of this form, or no such component.
    """
    result: dict[str, dict[str, Any]] = {}
    for text in assignments:
        target, equals, value = text.partition("=")
        component, dot, field = target.partition(".")
        if not (equals and dot and field) or component not in COMPONENTS:
            raise UserError(f"--set {text!r}: write COMPONENT.FIELD=VALUE with one of {', '.join(COMPONENTS)}")
        try:
            result.setdefault(component, {})[field] = json.loads(value)
        except ValueError:
            raise UserError(f"--set {text!r}: {value!r} is no number, true, false or JSON list") from None
    return result
