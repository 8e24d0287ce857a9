"""LMDB data sets -> caches of this project, which carry checksums and need no other package."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from x2v_jax.errors import UserError

from .cache import CacheWriter
from .cache_format import Plan, TensorSpec, rows_for
from .latents import LatentCache, Progress, fill
from .lmdb_file import LmdbData
from .trajectories import TrajectoryCache, TrajectoryWriter


def import_lmdb(
    path: str | os.PathLike[str],
    data: LmdbData,
    *,
    timesteps: Sequence[float] | None = None,
    rows_per_shard: int | None = None,
    progress: Progress = lambda done, total: None,
) -> LatentCache | TrajectoryCache:
    """Copies latents or trajectories, or goes on with it where it was interrupted.

    Args:
        path: the folder to make.
        data: where from.
        timesteps: of the states of trajectories, for instance (1000, 757, 522, 0): the files do not say them.
        progress: called with (rows done, rows in all).

    Raises:
        UserError: timesteps missing or of another number, a damaged row, or the folder holds something else.
    """
    if data.num_states > 1:
        return _import_trajectories(path, data, timesteps, rows_per_shard, progress)
    if timesteps is not None:
        raise UserError(f"{data.path} holds clean latents, which have no timesteps; leave --timesteps out")
    spec = TensorSpec("float16", data.latent_size)
    items = [{"text": caption, "file": f"row {row}"} for row, caption in enumerate(data.captions)]
    plan = Plan("latents", {"imported": "lmdb"}, {"latents": spec}, items, rows_per_shard or rows_for(spec.row_bytes))
    fill(CacheWriter(path, plan), lambda row: {"latents": data.latents([row])[0].astype(np.float16)}, progress=progress)
    return LatentCache.open(path)


def _import_trajectories(
    path: str | os.PathLike[str],
    data: LmdbData,
    timesteps: Sequence[float] | None,
    rows_per_shard: int | None,
    progress: Progress,
) -> TrajectoryCache:
    if timesteps is None or len(timesteps) != data.num_states:
        given = "they are not given" if timesteps is None else f"{len(timesteps)} are given"
        raise UserError(
            f"{data.path} holds trajectories of {data.num_states} states; say at which timesteps they are ({given}), "
            "noise first and 0 last: --timesteps 1000,757,522,0 for CausVid's"
        )
    writer = TrajectoryWriter(
        path,
        prompts=data.captions,
        latent_size=data.latent_size,
        sigmas=[t / 1000 for t in timesteps],
        settings={"imported": "lmdb"},
        rows_per_shard=rows_per_shard,
    )
    pending = list(writer.pending())
    done = len(data) - sum(len(rows) for _, rows in pending)
    progress(done, len(data))
    for shard, rows in pending:
        writer.write(shard, data.states(rows))
        done += len(rows)
        progress(done, len(data))
    writer.finish()
    return TrajectoryCache.open(path)


def extract_images(
    folder: str | os.PathLike[str], data: LmdbData, progress: Progress = lambda done, total: None
) -> pathlib.Path:
    """Writes the first frames as PNG files, with captions.jsonl for `python -m train.prepare images`.

    Returns:
        captions.jsonl.

    Raises:
        UserError: the data set has no pictures, or the folder cannot be written.
    """
    from x2v_jax.media.video import write_files, write_png

    folder = pathlib.Path(folder)
    if not data.has_images:
        raise UserError(f"{data.path} has no pictures (no img_0_data); leave --images out")
    lines = []
    for row in range(len(data)):
        name = f"{row:06d}.png"
        if not (folder / name).is_file():
            write_png(folder / name, data.image(row))
        lines.append(json.dumps({"image": name, "caption": data.prompt(row)}, ensure_ascii=False))
        progress(row + 1, len(data))
    captions = folder / "captions.jsonl"
    write_files({captions: "".join(f"{line}\n" for line in lines).encode()})
    return captions
