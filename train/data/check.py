"""Looks for damage in training data: every file, every number, every count."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.errors import UserError

from .cache import read_note
from .cache_format import Plan, plan_digest, values_digest
from .lmdb_file import LmdbData, is_lmdb

Progress = Callable[[int, int], None]

_MOST = 50


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found. problems: a sentence each, empty for sound data."""

    path: pathlib.Path
    kind: str
    rows: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {self.rows} rows"]
        lines += [f"broken: {problem}" for problem in self.problems[:_MOST]]
        if len(self.problems) > _MOST:
            lines.append(f"broken: {len(self.problems) - _MOST} more")
        return "\n".join([*lines, "sound" if not self.problems else f"{len(self.problems)} problems"])


def check(path: str | os.PathLike[str], progress: Progress = lambda done, total: None) -> Report:
    """Checks a cache of prompts, latents, images or trajectories, or an LMDB.

    Of a cache: that all shards are there and belong to it, their tensors' names, types and shapes, the SHA-256 of their
    values, that values are finite, and that counts add up. Of an LMDB: the bytes of each row, finite values, prompts.

    Args:
        progress: called with (shards or rows done, in all).

    Raises:
        UserError: there is nothing that could be checked.
    """
    path = pathlib.Path(path)
    if is_lmdb(path):
        return _check_lmdb(path, progress)
    try:
        plan, index = Plan.read(path)
    except UserError as error:
        if not (path / "index.json").is_file():
            raise
        return Report(path, "unknown", 0, (str(error),))
    problems: list[str] = []
    rows = 0
    for shard in range(plan.num_shards):
        count, found = _check_shard(path, plan, index, shard)
        rows += count
        problems += found
        progress(shard + 1, plan.num_shards)
    if not index.get("complete"):
        problems.append(f"{path / 'index.json'}: is not complete; run the command that makes it again")
    elif not problems and rows != index.get("count"):
        problems.append(f"{path / 'index.json'}: says {index.get('count')} rows, and the shards hold {rows}")
    return Report(path, plan.kind, rows, tuple(problems))


def _check_shard(path: pathlib.Path, plan: Plan, index: dict[str, Any], shard: int) -> tuple[int, list[str]]:
    file = path / plan.shard_file(shard)
    fix = "delete it and run the command that makes it again"
    if not file.is_file():
        return 0, [f"{file}: is missing; run the command that makes it again"]
    try:
        note = read_note(file)
        tensors = {name: tensor.read() for name, tensor in read_safetensors(file).items()}
    except UserError as error:
        return 0, [f"{error} ({fix})"]
    problems = []
    if note.plan != plan_digest(index):
        problems.append(f"{file}: was made from another source or with other settings; {fix}")
    recorded = index["shards"][shard] if index.get("complete") and shard < len(index.get("shards", ())) else None
    if recorded is not None and (recorded["sha256"], recorded["count"]) != (note.sha256, len(note.rows)):
        problems.append(f"{file}: is not the shard that index.json names; {fix}")
    if tensors.keys() != plan.tensors.keys():
        problems.append(f"{file}: holds {', '.join(tensors)} and should hold {', '.join(plan.tensors)}; {fix}")
        return len(note.rows), problems
    if values_digest(tensors) != note.sha256:
        problems.append(f"{file}: its values are not those that were written (SHA-256 differs); {fix}")
    for name, spec in plan.tensors.items():
        if fault := spec.fault(tensors[name].shape, tensors[name].dtype, len(note.rows)):
            problems.append(f"{file}: {name} {fault}; {fix}")
        elif not np.isfinite(tensors[name]).all():
            problems.append(f"{file}: {name} holds NaN or infinity; {fix}")
    return len(note.rows), problems


def _check_lmdb(path: pathlib.Path, progress: Progress) -> Report:
    try:
        data = LmdbData(path)
    except UserError as error:
        return Report(path, "lmdb", 0, (str(error),))
    problems = []
    for row in range(len(data)):
        problems += _row_problems(data, row)
        progress(row + 1, len(data))
    kind = "lmdb of trajectories" if data.num_states > 1 else "lmdb of latents"
    return Report(path, kind, len(data), tuple(problems))


def _row_problems(data: LmdbData, row: int) -> Iterator[str]:
    part, own = data.locate(row)
    try:
        if not np.isfinite(part.row(own)).all():
            yield f"{part.path}: latents_{own}_data holds NaN or infinity"
    except UserError as error:
        yield str(error)
    try:
        if not part.prompt(own).strip():
            yield f"{part.path}: prompts_{own}_data is blank"
    except UserError as error:
        yield str(error)
    if part.get("img_0_data") is not None:
        try:
            part.image(own)
        except UserError as error:
            yield str(error)
