"""How fast and in how much memory a checkpoint is converted: python -m benchmarks.speed.convert

Writes a file of random bfloat16 weights in the official layout (2.8 GB for the 1.3B size), copies it plainly, converts
it, and prints MB/s of both and the conversion's peak resident memory above its start. Both include the sync to disk;
the file is in the page cache for both. Needs three times the file's size in DIR.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.names.wan import official_shapes
from x2v_jax.models.config import WanConfig

SIZES = {
    "small": WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4),
    "1.3b": WanConfig.t2v_1_3b(),
    "14b": WanConfig.t2v_14b(),
}


def write_random(path: pathlib.Path, config: WanConfig) -> int:
    """Writes a transformer of random weights and returns its bytes."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes = official_shapes("transformer", config)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    pool = np.random.default_rng(0).standard_normal(largest + 4096, np.float32).astype(bfloat16)
    with SafetensorsWriter(path, {key: (shape, bfloat16) for key, shape in shapes.items()}) as writer:
        for number, (key, shape) in enumerate(shapes.items()):
            start = number % 4096  # so that no two tensors are the same
            writer.write(key, pool[start : start + int(np.prod(shape))].reshape(shape))
    return path.stat().st_size


def copy_seconds(source: pathlib.Path, destination: pathlib.Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, destination)
    with destination.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def convert_here(source: str, destination: str) -> dict[str, float]:
    """Converts in this process; seconds, seconds of CPU, and bytes of resident memory above the start."""
    from x2v_jax.checkpoint.conversion.convert import ConversionOptions, convert

    before = peak_bytes()
    start, busy = time.perf_counter(), time.process_time()
    convert(source, destination, ConversionOptions(variant="base"))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage would report the parent's, where that was higher
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write (default: system's temp folder)")
    parser.add_argument("--convert", nargs=2, metavar=("SRC", "DST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(convert_here(*args.convert)))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        source = pathlib.Path(folder) / "diffusion_pytorch_model.safetensors"
        size = write_random(source, SIZES[args.size])
        copied = pathlib.Path(folder) / "copy"
        seconds = copy_seconds(source, copied)
        copied.unlink()
        # In a process of its own, so that its memory is its own.
        command = [sys.executable, "-m", "benchmarks.speed.convert", "--convert", str(source), f"{folder}/native"]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rate = size / result["seconds"] / 1e6
    print(f"file         {size / 1e9:.2f} GB, bfloat16, {args.size}")
    print(f"plain copy   {seconds:.1f} s, {size / seconds / 1e6:,.0f} MB/s")
    print(f"conversion   {result['seconds']:.1f} s, {rate:,.0f} MB/s, with SHA-256 of the source")
    print(f"             {result['cpu_seconds']:.1f} s of CPU in two threads")
    print(f"peak memory  {result['peak_bytes'] / 1e6:,.0f} MB above the start")


if __name__ == "__main__":
    main()
