"""Lists of files with captions: a folder with NAME.txt beside each file, or a JSON or JSONL list."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from x2v_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class CaptionedFile:
    """A video or a picture. name: as the list has it, or relative to the folder; it is kept with the data."""

    path: pathlib.Path
    name: str
    caption: str

    def item(self) -> dict[str, str]:
        return {"text": self.caption, "file": self.name}


def read_items(source: str | os.PathLike[str], what: str) -> list[CaptionedFile]:
    """The files that a folder or a list names, with their captions.

    - a folder: every video (or picture) in it, by name, with its caption in NAME.txt;
    - .json: {"FILE": "caption", …}, or a list of such entries as in JSONL;
    - .jsonl: a line each, ["FILE", "caption"] or {"video" (or "image", "file"): "FILE", "caption" (or "text"): "…"}.
    FILE is relative to the list.

    Args:
        what: "video" or "image".

    Raises:
        UserError: nothing there, a missing file or caption; the message names the file or line.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        items = list(_in_folder(path, VIDEO_SUFFIXES if what == "video" else IMAGE_SUFFIXES, what))
    elif not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; give a folder of {what}s, or a .json or .jsonl list of them")
    elif path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} is no .json or .jsonl list; give a folder of {what}s or such a list")
    else:
        items = [_item(path, where, entry, what) for where, entry in _entries(path)]
    if not items:
        raise UserError(f"{path} holds no {what}s; give a folder or a list that has some")
    return items


def _in_folder(folder: pathlib.Path, suffixes: tuple[str, ...], what: str) -> Iterator[CaptionedFile]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file()):
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{path} has no caption; write it to {caption.name} beside it, or give a .json list")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError(f"{caption}: is not UTF-8 text; save it as UTF-8") from None
        yield CaptionedFile(path, path.relative_to(folder).as_posix(), _checked(text, str(caption), what))


def _entries(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}: line {number}", _parse(line, f"{path}: line {number}")
        return
    content = _parse(text, str(path))
    if isinstance(content, dict):
        yield from ((f"{path}: {name!r}", [name, caption]) for name, caption in content.items())
    elif isinstance(content, list):
        yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(content, 1))
    else:
        raise UserError(f'{path}: is neither a JSON object {{"FILE": "caption"}} nor a list; mend it')


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); mend it") from None


def _item(path: pathlib.Path, where: str, entry: Any, what: str) -> CaptionedFile:
    if isinstance(entry, dict):
        name = next((entry[key] for key in (what, "file") if key in entry), None)
        caption = next((entry[key] for key in ("caption", "text", "prompt") if key in entry), None)
    else:
        name, caption = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if not isinstance(name, str) or not isinstance(caption, str):
        raise UserError(f'{where}: write ["FILE", "caption"] or {{"{what}": "FILE", "caption": "…"}}')
    file = path.parent / name
    if not file.is_file():
        raise UserError(f"{where}: {str(file)!r} does not exist; mend the list or put the {what} there")
    return CaptionedFile(file, name, _checked(caption.strip(), where, what))


def _checked(caption: str, where: str, what: str) -> str:
    if not caption:
        raise UserError(f"{where}: the caption is empty; describe the {what}")
    return caption
