"""What a cache of training data is on disk, and how it knows the network that made it.

A folder with
- items.jsonl: one JSON object a row of the source (its text, the file it came from), in order;
- index.json: format, kind, settings, the tensors of a shard, and, once it is complete, the shards with their SHA-256;
- shard-00000-of-00012.safetensors …: the numbers.

A shard appears under its name only when it is whole, and its header says to which plan it belongs, which items it holds
and the SHA-256 of its values. So an interrupted run goes on at the first shard that is not there, several hosts fill
one folder without talking, and a mix of two runs is noticed.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import ml_dtypes
import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.errors import UserError

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint


FORMAT = "x2v-jax-cache"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
ITEMS_FILE = "items.jsonl"
KINDS = ("prompts", "latents", "images", "trajectories")

DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int64": np.dtype(np.int64),
}
SHARD_BYTES = 256 << 20
# Values of a tensor that a fingerprint reads.
_SAMPLE = 1024


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of every shard. shape: without the leading axis, which has one entry a row ("rows"), one more than
    that ("rows + 1"), or any number ("any")."""

    dtype: str
    shape: tuple[int, ...]
    axis: Literal["rows", "rows + 1", "any"] = "rows"

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def fault(self, shape: Sequence[int], dtype: np.dtype, rows: int) -> str | None:
        """What is wrong with a tensor of a shard of `rows` rows; None if nothing is."""
        lengths = {"rows": rows, "rows + 1": rows + 1, "any": shape[0] if shape else 0}
        wanted = (lengths[self.axis], *self.shape)
        if tuple(shape) != wanted or dtype != DTYPES[self.dtype]:
            return f"is {dtype.name} {list(shape)} and should be {self.dtype} {list(wanted)}"
        return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cache is to hold, known before any of it is made.

    kind: one of KINDS. settings: JSON values that decide the numbers. items: one JSON object a row of the source.
    """

    kind: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    items: Sequence[Mapping[str, Any]]
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.items) // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The items that a shard is made from."""
        return range(shard * self.rows_per_shard, min(len(self.items), (shard + 1) * self.rows_per_shard))

    def shard_file(self, shard: int) -> str:
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def header(self) -> dict[str, Any]:
        """index.json as long as the cache is not complete."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "complete": False,
            "num_items": len(self.items),
            "items_sha256": hashlib.sha256(self.items_text()).hexdigest(),
            "rows_per_shard": self.rows_per_shard,
            "settings": json.loads(json.dumps(dict(self.settings))),
            "tensors": {name: dataclasses.asdict(spec) for name, spec in self.tensors.items()},
        }

    def items_text(self) -> bytes:
        lines = [json.dumps(dict(item), ensure_ascii=False, sort_keys=True) for item in self.items]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogatepass")

    @classmethod
    def read(cls, folder: pathlib.Path) -> tuple[Self, dict[str, Any]]:
        """The plan of a cache on disk, and its index.json.

        Raises:
            UserError: no cache, or a damaged one.
        """
        index = read_index(folder)
        path = folder / ITEMS_FILE
        try:
            text = path.read_bytes()
            items = [json.loads(line) for line in text.decode("utf-8", errors="surrogatepass").split("\n")[:-1]]
            tensors = {
                name: TensorSpec(spec["dtype"], tuple(spec["shape"]), spec["axis"])
                for name, spec in index["tensors"].items()
            }
            plan = cls(index["kind"], index["settings"], tensors, items, int(index["rows_per_shard"]))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); prepare the cache again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: {INDEX_FILE} or {ITEMS_FILE} is damaged ({error}); prepare it again") from None
        if hashlib.sha256(text).hexdigest() != index.get("items_sha256") or len(items) != index.get("num_items"):
            raise UserError(f"{path}: is not the file that {INDEX_FILE} was written with; prepare the cache again")
        return plan, index


def read_index(folder: pathlib.Path) -> dict[str, Any]:
    """index.json, checked as far as it says what the rest is.

    Raises:
        UserError: no such folder, no cache, or one of another format or version.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        what = "is no cache of training data (it has no index.json)" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; make one with `{shipped.command('prepare')}`")
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("kind") not in KINDS:
        raise UserError(f"{path}: is no index of training data; give a folder that `{shipped.command('prepare')}` made")
    if index.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {index.get('format_version')!r} and this program reads {FORMAT_VERSION}; "
            "update the program, or prepare the cache again"
        )
    return index


def plan_digest(header: Mapping[str, Any]) -> str:
    """What ties the shards of one plan together, from index.json or `Plan.header`."""
    names = ("kind", "num_items", "items_sha256", "rows_per_shard", "settings", "tensors")
    return hashlib.sha256(json.dumps({n: header.get(n) for n in names}, sort_keys=True).encode()).hexdigest()


def values_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and values of a shard."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {values.dtype.name} {values.shape}".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def rows_for(row_bytes: int) -> int:
    """Rows a shard, so that one has about 256 MB."""
    return max(1, min(1024, SHARD_BYTES // max(1, row_bytes)))


def fingerprint(checkpoint: "NativeCheckpoint", component: str) -> str:
    """A SHA-256 over the sizes of a component and about a thousand values of each of its tensors.

    Values are rounded to bfloat16 first, so that a float32 file and its bfloat16 copy have one fingerprint. The text
    encoder's covers the tokenizer's file, too: other ids are other embeddings.

    Raises:
        UserError: the checkpoint does not have the component.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config(component).to_dict(), sort_keys=True).encode())
    for name, tensor in checkpoint.tensors(component).items():
        values = tensor.read().reshape(-1)
        # Two stretches and not scattered values: of each tensor a few pages are read from the disk.
        sample = np.concatenate([values[: _SAMPLE // 2], values[values.size - min(values.size, _SAMPLE // 2) :]])
        digest.update(f"{name} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(sample.astype(ml_dtypes.bfloat16)).tobytes())
    if component == "text_encoder" and (tokenizer := checkpoint.tokenizer_file()) is not None:
        digest.update(tokenizer.read_bytes())
    return digest.hexdigest()


def require_same(where: str, recorded: str, checkpoint: "NativeCheckpoint", component: str, command: str) -> None:
    """Refuses data that another network made.

    Args:
        where: the data's place, for the message.
        recorded: the fingerprint kept with the data.
        command: of `python -m train.prepare` that makes them.

    Raises:
        UserError: the checkpoint's component is another one.
    """
    if fingerprint(checkpoint, component) != recorded:
        raise UserError(
            f"{where} was made with another {component} than {checkpoint.path} has; make it again with "
            f"`{shipped.command(f'prepare {command} … --checkpoint {checkpoint.path}')}`, or train from the checkpoint "
            "that it was made with"
        )
