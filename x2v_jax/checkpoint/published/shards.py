"""Groups the weight files of a folder into sets that belong together: indexed or numbered shards, blocks, parts."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from x2v_jax.checkpoint.files.json_file import is_plain_name, read_json
from x2v_jax.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_PART = re.compile(r"(?P<stem>.*?)_?part_?\d+")
_BLOCK = re.compile(r"block_\d+|non_block")


@dataclasses.dataclass(frozen=True)
class FileSet:
    """Files that hold one network. name: for messages. index: the weight map (key -> file name) where there is one."""

    name: str
    files: tuple[pathlib.Path, ...]
    index: Mapping[str, str] | None = None


def file_sets(folder: pathlib.Path) -> list[FileSet]:
    """The sets of a folder (its subfolders not looked at).

    Raises:
        UserError: an index is damaged, leads out of the folder, or names a file that is not there; a shard is missing.
    """
    sets: list[FileSet] = []
    taken: set[pathlib.Path] = set()
    for index_file in sorted(folder.glob("*.index.json")):
        index = _read_index(index_file)
        files = tuple(folder / name for name in sorted(set(index.values())))
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(f"{index_file}: {_list(missing)} not in the folder; download the missing files")
        if not taken.intersection(files):
            sets.append(FileSet(index_file.name, files, index))
        taken.update(files)
    families: dict[str, list[pathlib.Path]] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()):
        if path not in taken:
            families.setdefault(_family(path), []).append(path)
    for name, paths in families.items():
        _check_numbered(paths)
        sets.append(FileSet(name, tuple(paths)))
    return sets


def file_set_of(path: pathlib.Path) -> FileSet:
    """The set that one given file (a weight file, one shard of several, or an index) belongs to."""
    if path.name.endswith(".index.json"):
        return next(s for s in file_sets(path.parent) if s.name == path.name)
    if _family(path) == path.name:
        return FileSet(path.name, (path,))
    return next((s for s in file_sets(path.parent) if path in s.files), FileSet(path.name, (path,)))


def _family(path: pathlib.Path) -> str:
    stem = path.stem
    if match := _SHARD.fullmatch(stem):
        return f"{match['stem']}-*{path.suffix}"
    if _BLOCK.fullmatch(stem):
        return f"block_*{path.suffix}"
    if match := _PART.fullmatch(stem):
        return f"{match['stem']}_part*{path.suffix}"
    return path.name


def _check_numbered(paths: list[pathlib.Path]) -> None:
    match = _SHARD.fullmatch(paths[0].stem)
    if not match:
        return
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}{paths[0].suffix}" for i in range(1, count + 1)]
    missing = [name for name in names if not (paths[0].parent / name).is_file()]
    if missing:
        raise UserError(f"{paths[0].parent}: {_list(missing)} missing; download the missing files")


def _read_index(path: pathlib.Path) -> dict[str, str]:
    content = read_json(path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map in it; download the index again")
    for key, name in weight_map.items():
        # Names are judged as they are written: the files themselves may be links (download caches are built so).
        if not is_plain_name(name):
            raise UserError(f"{path}: {key} is said to be in {name!r}, outside the index's own folder; refused")
    return weight_map


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
