"""Writes and reads caches of training data, shard by shard; see cache_format.py for the files."""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from x2v_jax.checkpoint.files.atomic import complete_file
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_metadata, read_safetensors
from x2v_jax.errors import UserError

from .cache_format import INDEX_FILE, ITEMS_FILE, Plan, plan_digest, read_index, values_digest

_RACE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class ShardNote:
    """What the header of a shard says. rows: the items it holds, by number."""

    plan: str
    rows: tuple[int, ...]
    sha256: str


class CacheWriter:
    """Makes a cache, or goes on with one. Several hosts may work on one folder, each on its own shards.

    >>> from train.data.cache_format import TensorSpec
    >>> items = [{"file": "a.mp4"}, {"file": "b.mp4"}, {"file": "c.mp4"}]
    >>> plan = Plan("latents", {}, {"latents": TensorSpec("float16", (8,))}, items, rows_per_shard=2)
    >>> writer = CacheWriter("cache", plan)
    >>> for shard in writer.pending():
    ...     writer.write(shard, {"latents": np.zeros((len(plan.rows(shard)), 8), np.float16)})
    >>> writer.finish()
    True
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan):
        """Writes items.jsonl and index.json unless they are there already.

        Raises:
            UserError: nothing to do, the folder holds something else, or a cache with other settings.
        """
        self.path = pathlib.Path(path)
        self.plan = plan
        if not plan.items:
            raise UserError(f"{self.path}: there is nothing to put into it; the source has no entries")
        self._header = plan.header()
        self._digest = plan_digest(self._header)
        if (self.path / INDEX_FILE).exists():
            _refuse_other(self.path, read_index(self.path), self._header)
            return
        if self.path.exists() and (not self.path.is_dir() or any(p.name != ITEMS_FILE for p in _listed(self.path))):
            raise UserError(f"{self.path} exists and holds something else; choose another folder or empty it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another folder") from None
        _write_once(self.path / ITEMS_FILE, plan.items_text())
        _write_once(self.path / INDEX_FILE, _json(self._header))

    def pending(self, host: int = 0, hosts: int = 1) -> list[int]:
        """The shards that are still to be made by host `host` of `hosts`: numbers host, host + hosts, …

        Raises:
            UserError: a shard of another plan lies in the folder.
        """
        return [shard for shard in range(host, self.plan.num_shards, hosts) if self._note(shard) is None]

    def write(self, shard: int, tensors: Mapping[str, np.ndarray], rows: Sequence[int] | None = None) -> None:
        """Writes one shard.

        Args:
            shard: its number.
            tensors: as the plan's specs have them.
            rows: the items that it holds, where some of `plan.rows(shard)` could not be used.

        Raises:
            ValueError: tensors do not fit the plan, or hold NaN or infinity.
            UserError: the disk is full or the folder cannot be written.
        """
        kept = tuple(self.plan.rows(shard) if rows is None else rows)
        if tensors.keys() != self.plan.tensors.keys() or not set(kept) <= set(self.plan.rows(shard)):
            raise ValueError(f"shard {shard} needs {sorted(self.plan.tensors)} of rows {self.plan.rows(shard)}")
        for name, spec in self.plan.tensors.items():
            if fault := spec.fault(tensors[name].shape, tensors[name].dtype, len(kept)):
                raise ValueError(f"shard {shard}: {name} {fault}")
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"shard {shard}: {name} holds NaN or infinity")
        note = {
            "plan": self._digest,
            "rows": json.dumps(kept),
            "sha256": values_digest(tensors),
        }
        file = self.path / self.plan.shard_file(shard)
        with SafetensorsWriter(file, {n: (t.shape, t.dtype) for n, t in tensors.items()}, note) as writer:
            for name, values in tensors.items():
                writer.write(name, values)

    def finish(self) -> bool:
        """Completes index.json when all shards are there. False: other hosts still have some to make.

        Raises:
            UserError: not one item could be used.
        """
        notes = [self._note(shard) for shard in range(self.plan.num_shards)]
        if any(note is None for note in notes):
            return False
        found = [note for note in notes if note is not None]
        kept = {row for note in found for row in note.rows}
        if not kept:
            raise UserError(f"{self.path}: not one entry of the source could be used; mend them and run again")
        shards = [
            {"file": self.plan.shard_file(i), "count": len(note.rows), "sha256": note.sha256}
            for i, note in enumerate(found)
        ]
        dropped = [row for row in range(len(self.plan.items)) if row not in kept]
        index = self._header | {"complete": True, "count": len(kept), "dropped": dropped, "shards": shards}
        _write_once(self.path / INDEX_FILE, _json(index))
        return True

    def _note(self, shard: int) -> ShardNote | None:
        file = self.path / self.plan.shard_file(shard)
        if not file.is_file():
            return None
        try:
            note = read_note(file)
            if note.plan == self._digest:
                read_safetensors(file)
        except UserError:
            return None  # cut short by a failing disk: it is made again
        if note.plan != self._digest:
            raise UserError(f"{file} was made from another source or with other settings; empty the folder")
        return note


class Cache:
    """A complete cache, read by row. Values stay in the files until they are asked for.

    Attributes:
        path: the folder.
        settings: what decided the numbers.
        items: one JSON object a row.
    """

    def __init__(self, path: pathlib.Path, plan: Plan, index: Mapping[str, Any]):
        """See `open`."""
        self.path = path
        self.settings = plan.settings
        self.tensors = plan.tensors
        dropped = set(index["dropped"])
        self.items = [item for row, item in enumerate(plan.items) if row not in dropped]
        self.shards: list[dict[str, Any]] = index["shards"]
        self._ends = np.cumsum([shard["count"] for shard in self.shards])

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: str) -> Self:
        """Opens a cache of one kind.

        Raises:
            UserError: no cache, one of another kind, one that is not complete or damaged.
        """
        folder = pathlib.Path(path)
        plan, index = Plan.read(folder)
        if plan.kind != kind:
            raise UserError(f"{folder} holds {plan.kind}, not {kind}; give the folder of a {kind} cache")
        if not index.get("complete"):
            made = sum((folder / plan.shard_file(shard)).is_file() for shard in range(plan.num_shards))
            raise UserError(
                f"{folder} is not complete: {made} of {plan.num_shards} shards are there; run the command that makes "
                "it again, it goes on where it stopped"
            )
        damaged = UserError(f"{folder / INDEX_FILE}: its counts contradict each other; prepare the cache again")
        try:
            cache = cls(folder, plan, index)
            consistent = len(cache) == len(cache.items) and len(cache.shards) == plan.num_shards
        except (KeyError, TypeError, ValueError):
            raise damaged from None
        if not consistent:
            raise damaged
        return cache

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """tensor[rows] of a tensor with one entry a row, in its stored type.

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        spec = self.tensors[name]
        result = np.empty((len(rows), *spec.shape), self.shard(0)[name].dtype)
        for place, (shard, position) in enumerate(map(self.locate, rows)):
            result[place] = self.shard(shard)[name].read()[position]
        return result

    def locate(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its place in the shard."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, and row {row} is none of them")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, int(row) - int(self._ends[shard]) + self.shards[shard]["count"]

    def shard(self, number: int) -> dict[str, LazyTensor]:
        """The tensors of a shard."""
        return self._opened(number)

    @functools.cached_property
    def _opened(self) -> Any:
        @functools.cache
        def opened(number: int) -> dict[str, LazyTensor]:
            entry = self.shards[number]
            file = self.path / entry["file"]
            if not file.is_file():
                raise UserError(f"{file} is missing; run the command that makes this cache again")
            tensors = read_safetensors(file)
            wrong = [
                f"{name} {fault}"
                for name, spec in self.tensors.items()
                if name in tensors and (fault := spec.fault(tensors[name].shape, tensors[name].dtype, entry["count"]))
            ]
            if wrong or tensors.keys() != self.tensors.keys():
                what = "; ".join(wrong) or f"it holds {', '.join(tensors)}"
                raise UserError(f"{file} is not the shard that was made ({what}); delete it and prepare again")
            return tensors

        return opened


def read_note(file: pathlib.Path) -> ShardNote:
    """The header of a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    metadata = read_metadata(file)
    try:
        return ShardNote(metadata["plan"], tuple(json.loads(metadata["rows"])), metadata["sha256"])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{file}: is no shard of training data; delete it and prepare again") from None


def _refuse_other(path: pathlib.Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if plan_digest(theirs) == plan_digest(ours):
        return
    if theirs["kind"] != ours["kind"]:
        raise UserError(f"{path} holds {theirs['kind']}, not {ours['kind']}; choose another folder")
    before, now = theirs.get("settings", {}), ours["settings"]
    changed = [f"{k} was {_short(before.get(k))} and is {_short(now.get(k))}" for k in now if before.get(k) != now[k]]
    if theirs.get("items_sha256") != ours["items_sha256"]:
        changed.append(f"the source had {theirs.get('num_items')} other entries, now {ours['num_items']}")
    raise UserError(
        f"{path} holds a cache that was begun differently ({'; '.join(changed) or 'its tensors have other shapes'}); "
        "choose another folder, or delete this one to begin again"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in folder.iterdir() if not p.name.endswith(".incomplete")]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _write_once(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that another host may be writing with the same bytes at this moment."""
    for _ in range(_RACE_SECONDS * 10):
        if path.is_file() and path.read_bytes() == data:
            return
        try:
            with complete_file(path, len(data)) as file:
                file.write_at(0, data)
            return
        except UserError as error:
            if "another process" not in str(error):
                raise
        time.sleep(0.1)
    raise UserError(f"{path}: another process keeps writing it; stop that one")
