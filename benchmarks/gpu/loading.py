"""From a checkpoint's files on the local disk to weights on the device: bytes a second."""

import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks.gpu.sections import Row, guarded
from benchmarks.gpu.settings import Settings, models
from x2v_jax.checkpoint.names.wan import native_shapes
from x2v_jax.checkpoint.native.reader import open_checkpoint, save_native
from x2v_jax.generate.network import Network
from x2v_jax.models.config import Schedule


def loading_rows(settings: Settings) -> Iterator[Row]:
    """The 1.3B transformer in bfloat16: with its file in the page cache, and without as far as the system allows."""
    with tempfile.TemporaryDirectory() as folder:
        config = models("T2V-1.3B", "480P", settings).transformer
        path = pathlib.Path(folder, "checkpoint")
        save_native(
            path,
            task="t2v",
            variant="base",
            schedule=Schedule(),
            components={"transformer": (config, _weights(config))},
        )
        for name, cached in (("from the page cache", True), ("from the disk", False)):
            yield guarded(settings, {"model": "T2V-1.3B", "case": name}, lambda c=cached: _measure(path, c))


def _measure(path: pathlib.Path, cached: bool) -> Row:
    checkpoint = open_checkpoint(path)
    files = checkpoint.files("transformer")
    if not cached:
        for file in files:
            _forget(file)
    tensors = checkpoint.tensors("transformer")
    network = Network.of(checkpoint, "transformer", dtype="bfloat16", tensors=tensors)
    begin = time.perf_counter()
    params = jax.block_until_ready(network.load())
    seconds = time.perf_counter() - begin
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"seconds": seconds, "bytes": size, "bytes_a_second": size / seconds}


def _forget(file: pathlib.Path) -> None:
    """Asks the system to drop what it holds of a file in memory."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


def _weights(config: Any) -> dict[str, np.ndarray]:
    # Of one page repeated: what the numbers are does not matter, and drawing them would take longer than reading.
    page = np.random.default_rng(0).standard_normal(1 << 12).astype(ml_dtypes.bfloat16)
    return {name: np.resize(page, shape) for name, shape in native_shapes("transformer", config).items()}
