"""How long the first video of a process takes with nothing compiled yet, the steps unrolled and scanned in turn.

    python -m benchmarks.speed.first_video --write

Every run is a process of its own without a compilation cache: a pipeline on the shipped four-step model, then its first
`pipe(…)`. Clock and processor time are told apart, since a busy machine only spoils the first. The videos of both loops
are compared.
"""

import argparse
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, get_args

from benchmarks.reports import circumstances
from x2v_jax.diffusion.schedules import Loop

RECORD = pathlib.Path(__file__).parent / "results" / "first_video.json"
_CHECKPOINT = pathlib.Path(__file__).parents[1] / "assets" / "shapes_t2v_4step"
_LIMIT = 1.3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed.first_video", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each loop")
    parser.add_argument("--write", action="store_true", help="put these numbers into the record")
    parser.add_argument("--only", choices=get_args(Loop), help="one run with this loop, in this process")
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(measure(options.only)))
        return 0
    runs: list[dict[str, Any]] = []
    for _ in range(options.repeat):
        for loop in get_args(Loop):
            command = [sys.executable, "-m", "benchmarks.speed.first_video", f"--only={loop}"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(printed.splitlines()[-1]))
            print(runs[-1], flush=True)
    ratio, same = compare(runs)
    print(f"unrolled takes {ratio:.2f} times the scan's processor time; the videos {'are equal' if same else 'differ'}")
    if options.write:
        made = circumstances("benchmarks.speed.first_video", sys.argv[1:] if arguments is None else arguments)
        made |= {"ratio": round(ratio, 3), "same_video": same, "runs": runs}
        RECORD.write_text(json.dumps(made, indent=1) + "\n")
    return 0 if ratio <= _LIMIT and same else 1


def measure(loop: Loop) -> dict[str, Any]:
    """Seconds of a first video in this process, and a digest of its frames."""
    import jax

    from x2v_jax.pipeline import Pipeline

    jax.config.update("jax_enable_compilation_cache", False)
    pipe = Pipeline.from_checkpoint(_CHECKPOINT, denoising_loop=loop)
    clock, processor = time.perf_counter(), time.process_time()
    frames = pipe("a red circle moves left", seed=7)
    return {
        "loop": loop,
        "seconds": round(time.perf_counter() - clock, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "frames": hashlib.sha256(frames.tobytes()).hexdigest(),
    }


def compare(runs: list[dict[str, Any]]) -> tuple[float, bool]:
    """(median processor time unrolled / scanned, whether all videos are the same)."""
    unrolled, scan = (
        statistics.median(run["processor_seconds"] for run in runs if run["loop"] == loop) for loop in get_args(Loop)
    )
    return unrolled / scan, len({run["frames"] for run in runs}) == 1


if __name__ == "__main__":
    sys.exit(main())
