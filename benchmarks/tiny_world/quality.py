"""Measures a text-to-video model of the tiny world: does each video show what its prompt says?

    python -m benchmarks.tiny_world.quality --checkpoint assets/shapes --prompts 200

samples prompts whose wording training never showed, and prints how often colour, shape and direction are right (with
Wilson's 95 % interval), how smooth the motion is and how far the videos are from real ones. The same judge is run on
real videos and on the autoencoder's reconstructions of them, so that its own mistakes are seen beside the model's.
A JSON file and a contact sheet (PNG) go to --out. Takes a few minutes on two CPU cores.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.reports import circumstances
from x2v_jax.errors import UserError
from x2v_jax.request import Request
from x2v_jax.request.resolve import ResolvedRequest, resolve

if TYPE_CHECKING:
    from benchmarks.tiny_world.examine import Examined

_SHEET_ROWS = 24


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        _check(args)
        checkpoint = _open(args)
        request = None if args.judge_only or checkpoint is None else _request(args, checkpoint)
        if args.out.is_dir():
            raise UserError(f"--out is {str(args.out)!r}, a folder; give the name of a JSON file")
        report, sheet = measure(args, checkpoint, request)
        _write(args.out, report, sheet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(args: Any, checkpoint: Any, request: ResolvedRequest | None) -> tuple[dict[str, Any], bytes | None]:
    """Runs the measurement and prints the table.

    Args:
        args: as `--help` lists them.
        checkpoint: from `open_checkpoint`; None judges real videos only.
        request: None to measure the judge alone.

    Returns:
        the JSON report, and the contact sheet as PNG (None without a request).
    """
    from benchmarks.tiny_world.examine import examine
    from benchmarks.tiny_world.frechet import diversity, frechet_distance, largest_differences
    from benchmarks.tiny_world.report import plain, table
    from benchmarks.tiny_world.sampling import ShapesModel
    from train.shapes.judge import label_names
    from train.shapes.world import first_frames, heldout_prompts, real_videos
    from x2v_jax.media.pixels import to_uint8

    prompts = heldout_prompts(args.prompts, args.seed)
    wanted = label_names(prompts)

    def look(name: str, batches: Any, keep: bool = False) -> Any:
        return examine(batches, wanted, name=name, progress=not args.quiet, keep=keep)

    # Two independent real sets of the same prompts: what everything is compared with, and what real data itself gets.
    reference = look("real videos", map(to_uint8, real_videos(prompts, args.seed + 1)))
    real = look("more real videos", map(to_uint8, real_videos(prompts, args.seed)))
    sets = {}
    report: dict[str, Any] = {
        **circumstances("benchmarks.tiny_world.quality", args.given),
        "reference": reference.summary(),
    }
    sheet = None
    if checkpoint is not None:
        report["checkpoint"] = _fingerprint(checkpoint)
        model = ShapesModel(checkpoint, args.dtype, ("vae",) if request is None else ShapesModel.COMPONENTS)
        if request is not None:
            texts = [prompt.text for prompt in prompts]
            frames = None
            if checkpoint.task == "i2v":
                # Scenes of their own: neither those that are compared with nor the reference's.
                frames = first_frames(prompts, args.seed + 2)
            generated = model.generate(texts, request, args.batch, frames)
            sets["generated"] = made = look("sampling", generated, keep=True)
            if frames is not None:
                report["first_frame_psnr"] = first_frame_psnr(made.videos, frames)
            sheet = _sheet(made, texts)
            report["request"] = {
                k: v for k, v in vars(request.completed).items() if k not in ("prompt", "image") and v is not None
            }
            report["seconds"] = _seconds(made) | model.seconds_per_video()
            report["network_calls"] = network_calls(request, checkpoint.schedule)
            report["videos"] = [{"prompt": t, "seed": args.seed + i} | made.row(i) for i, t in enumerate(texts)]
            report["largest_differences"] = dict(largest_differences(made.features, reference.features))
        again = (part for batch in real_videos(prompts, args.seed) for part in model.reconstruct(batch, args.batch))
        sets["reconstructions"] = look("reconstructing", again)
    sets["real"] = real
    report["diversity"] = {name: diversity(found.features, wanted) for name, found in sets.items()}
    report["results"] = {
        name: {**found.summary(), "frechet": frechet_distance(found.features, reference.features)}
        for name, found in sets.items()
    }
    print(f"{len(prompts)} prompts whose wording is not in the training set, seed {args.seed}")
    print(table(report["results"]))
    print("Fréchet: to other real videos of the same prompts; the row 'real' is its floor at this number of videos.")
    print("spread among videos of one meaning: " + ", ".join(f"{k} {v:.2f}" for k, v in report["diversity"].items()))
    if "first_frame_psnr" in report:
        psnr = report["first_frame_psnr"]
        print(f"first frame against the given one: {psnr['mean']:.1f} dB on average, {psnr['lowest']:.1f} at worst")
    if "seconds" in report:
        apart = report["seconds"]
        print(
            f"{report['network_calls']}; a video takes {apart['denoise']:.3f} s of denoising and "
            f"{apart['decode']:.3f} s of decoding, in batches of {args.batch}"
        )
    if "largest_differences" in report:
        print("farthest from real in " + ", ".join(f"{k} ({v:.2f})" for k, v in report["largest_differences"].items()))
    return plain(report), sheet


def first_frame_psnr(videos: Any, frames: Any) -> dict[str, float]:
    """Decibels between the first frames of videos uint8 [N, F, H, W, 3] and the given ones [N, H, W, 3]."""
    import numpy as np

    error = np.square(np.asarray([video[0] for video in videos], np.float64) - frames)
    values = 10 * np.log10(255.0**2 / np.maximum(error.mean(axis=(1, 2, 3)), 1e-9))
    return {"mean": float(values.mean()), "lowest": float(values.min())}


def network_calls(request: ResolvedRequest, schedule: Any) -> str:
    """How often the transformer is evaluated for a video, in words."""
    steps = request.num_inference_steps
    if schedule.causal is not None:
        clean = " + 1" if schedule.causal.context_timestep is not None else ""
        return f"{steps}{clean} network calls a block"
    return f"{steps * (2 if request.uses_guidance else 1)} network calls a video"


def _sheet(made: "Examined", texts: Sequence[str]) -> bytes:
    from benchmarks.tiny_world.report import contact_sheet, sheet_rows

    rows = sheet_rows(made.right, _SHEET_ROWS)
    return contact_sheet(
        [made.videos[i] for i in rows],
        [texts[i] for i in rows],
        [made.wanted[i] for i in rows],
        [made.verdicts[i] for i in rows],
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, default=pathlib.Path("assets/shapes"), help="native checkpoint"
    )
    parser.add_argument("--prompts", type=int, default=200, help="number of unseen prompts (default 200)")
    parser.add_argument("--steps", type=int, help="UniPC steps; default: the checkpoint's schedule")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none; default: the checkpoint's schedule")
    parser.add_argument("--step-list", type=_steps, help="timesteps of a few-step sampler, such as 1000,750,500,250")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, noise and real videos; video i has seed + i")
    parser.add_argument("--batch", type=int, default=20, help="videos sampled together (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and matmuls")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("outputs/shapes_quality.json"), help="JSON file"
    )
    parser.add_argument("--judge-only", action="store_true", help="only validate the judge; needs no checkpoint")
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="settings that contradict the checkpoint's schedule"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    return args


def _steps(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _check(args: Any) -> None:
    limits = {"prompts": (2, 2000), "batch": (1, 1024), "seed": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; give a whole number from {low} to {high}")


def _open(args: Any) -> Any:
    if args.judge_only and not args.checkpoint.exists():
        print(f"no checkpoint at {args.checkpoint}: reconstructions are left out", file=sys.stderr)
        return None
    from x2v_jax.checkpoint.native.reader import open_checkpoint

    return open_checkpoint(args.checkpoint)


def _request(args: Any, checkpoint: Any) -> ResolvedRequest:
    import numpy as np

    asked = Request(
        prompt="-",
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        denoising_step_list=args.step_list,
        # Only its size counts here: each video has an image of its own.
        image=np.zeros((64, 64, 3), np.uint8) if checkpoint.task == "i2v" else None,
    )
    return resolve(asked, checkpoint, allow_mismatch=args.allow_mismatch)


def _fingerprint(checkpoint: Any) -> dict[str, Any]:
    files = sorted(checkpoint.path.glob("*.safetensors"))
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"path": str(checkpoint.path), "variant": checkpoint.variant, "sha256": sums}


def _seconds(made: "Examined") -> dict[str, float | None]:
    """Of sampling and decoding. The first batch compiles, so the rest tells the speed."""
    rest = sum(made.batch_sizes[1:])
    return {"first_batch": made.seconds[0], "per_video_after": sum(made.seconds[1:]) / rest if rest else None}


def _write(out: pathlib.Path, report: dict[str, Any], sheet: bytes | None) -> None:
    from x2v_jax.media.video import write_files

    contents = {out: (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode()}
    if sheet is not None:
        contents[out.with_suffix(".png")] = sheet
    write_files(contents)
    print("written: " + ", ".join(map(str, contents)))


if __name__ == "__main__":
    sys.exit(main())
