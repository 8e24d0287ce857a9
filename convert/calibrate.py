"""`python -m convert calibrate`: records the activations of a transformer while it makes videos."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.quantize.calibration import Calibration, check_destination, write_calibration
from x2v_jax.errors import UserError
from x2v_jax.media.image import load_image
from x2v_jax.request import Request
from x2v_jax.request.inputs import InputFiles
from x2v_jax.request.options import RunOptions
from x2v_jax.request.prompt_file import read_prompts
from x2v_jax.request.resolve import ResolvedRequest, resolve
from x2v_jax.shipped import VERSION

_PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))

# Called with (steps or blocks of all videos that are done, and in all).
Progress = Callable[[int, int], None]


def calibrate(args: argparse.Namespace) -> None:
    """Runs the parsed command. All that can be wrong is said before anything is loaded.

    Raises:
        UserError: the checkpoint cannot be recorded, prompts or images cannot be read, or DST cannot be written.
    """
    destination = check_destination(args.destination)
    checkpoint = open_checkpoint(args.checkpoint)
    check_recordable(checkpoint)
    requests = _requests(args, checkpoint)
    options = RunOptions(dtype=args.dtype, offload=args.offload)
    from tqdm import tqdm

    with tqdm(unit="step", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        calibration = Calibration(
            record(checkpoint, requests, options, progress), about(checkpoint, requests), destination
        )
    write_calibration(calibration)
    print("\n".join([*summary(calibration), f"wrote {destination}"]))


def check_recordable(checkpoint: NativeCheckpoint) -> None:
    """
    Raises:
        UserError: the transformer is 8-bit, or something that a video takes is missing.
    """
    for name in checkpoint.components:  # headers and names only: a damaged file is said before jax is imported
        _ = checkpoint.tokenizer_file() if name == "tokenizer" else checkpoint.tensors(name)
    if not checkpoint.has("transformer"):
        raise UserError(f"{checkpoint.path} has no transformer; give a checkpoint that makes videos")
    quantization = checkpoint.quantization("transformer")
    if quantization is not None:
        raise UserError(
            f"{checkpoint.path}: the transformer is {quantization} already, and activations are recorded before; give "
            "the checkpoint of its 16- or 32-bit weights"
        )


def record(
    checkpoint: NativeCheckpoint,
    requests: Sequence[ResolvedRequest],
    options: RunOptions,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Makes the videos of resolved requests and records the transformer's inputs on the way.

    Returns:
        The largest magnitudes, as `Calibration.maxima` has them.

    Raises:
        UserError: a video cannot be made.
    """
    from x2v_jax.models.activation_stats import listening
    from x2v_jax.pipeline import Pipeline

    pipeline = Pipeline(checkpoint, **dataclasses.asdict(options))
    config = checkpoint.config("transformer")
    maxima = Maxima(config.num_layers, config.dim)
    with listening(maxima.hear):
        pipeline.prepare(requests)
        for number, request in enumerate(requests):

            def on_step(step: int, count: int, latents: object, number: int = number) -> None:
                on_progress(number * count + step + 1, len(requests) * count)
                if step + 1 == count:
                    raise _HeardAll

            with contextlib.suppress(_HeardAll):
                pipeline.generate(request, on_step)
    return maxima.result()


class _HeardAll(Exception):
    """The transformer has done its part of a video; nobody waits for the pixels."""


class Maxima:
    """The largest magnitudes heard so far, by input and layer."""

    def __init__(self, layers: int, dim: int):
        self._largest = {name: np.zeros((layers, dim), np.float32) for name in GROUPS}
        self._heard = {name: np.zeros(layers, int) for name in GROUPS}

    def hear(self, name: str, layer: int, largest: np.ndarray) -> None:
        """largest: [D]. NaN stays."""
        self._largest[name][layer] = np.maximum(self._largest[name][layer], largest)
        self._heard[name][layer] += 1

    def result(self) -> dict[str, np.ndarray]:
        """
        Raises:
            RuntimeError: not every layer was heard as often as the others.
        """
        counts = {int(count) for each in self._heard.values() for count in each}
        if len(counts) != 1 or counts == {0}:
            raise RuntimeError(f"layers were heard {sorted(counts)} times: the network did not run as a whole")
        return self._largest


def summary(calibration: Calibration) -> list[str]:
    """A line an input: how much larger the largest channel is than the middle one, in the middle and worst layer."""
    lines = ["largest channel over the middle one:"]
    for name, largest in calibration.maxima.items():
        ratios = largest.max(1) / np.maximum(np.median(largest, 1), np.float32(1e-30))
        worst = int(np.argmax(ratios))
        lines.append(
            f"  {name}: {np.median(ratios):.1f} in the middle of the layers, {ratios[worst]:.1f} in layer {worst}"
        )
    return lines


def about(checkpoint: NativeCheckpoint, requests: Sequence[ResolvedRequest]) -> dict[str, str]:
    """What the header of a calibration says of resolved requests."""
    first = requests[0]
    return {
        "config": json.dumps(checkpoint.config("transformer").to_dict()),
        "variant": checkpoint.variant,
        "prompts": str(len(requests)),
        "prompts_sha256": hashlib.sha256("\n".join(request.prompt for request in requests).encode()).hexdigest(),
        "size": f"{first.num_frames} frames of {first.width} x {first.height}",
        "seed": str(first.seed),
        "x2v_jax": VERSION,
    }


def _requests(args: argparse.Namespace, checkpoint: NativeCheckpoint) -> list[ResolvedRequest]:
    prompts = [prompt.text for prompt in read_prompts(args.prompts, "--prompts")][: args.limit]
    if checkpoint.task == "i2v" and args.images is None:
        raise UserError(f"--images: {checkpoint.path} makes videos of images; give a picture, a folder or a list")
    if checkpoint.task != "i2v" and args.images is not None:
        raise UserError(f"--images: {checkpoint.path} makes videos of text alone; leave --images out")
    images = [None] if args.images is None else _images(pathlib.Path(args.images))[: len(prompts)]
    files = InputFiles()
    sizes = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    return [
        resolve(Request(prompt, image=images[i % len(images)], seed=args.seed + i, **sizes), checkpoint, files=files)
        for i, prompt in enumerate(prompts)
    ]


def _images(path: pathlib.Path) -> list[str]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES)
        kind = "picture in this folder"
    elif path.suffix.lower() in _PICTURES:
        found, kind = [path], "picture"
    else:
        found = [path.parent / line for line in _lines("--images", path)]
        kind = "path of a picture in it; write one a line"
    if not found:
        raise UserError(f"--images {path}: there is no {kind}")
    for picture in found:
        try:
            load_image(picture)
        except UserError as error:
            raise UserError(f"--images {path}: {error}") from None
    return [str(picture) for picture in found]


def _lines(flag: str, path: pathlib.Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path}: it cannot be read ({error.strerror}); mend the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: it is not UTF-8 text; save it as UTF-8, one entry a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
