"""Files of prompts, by one rule in every program. No jax import.

A line is a prompt. Blank lines and lines that begin with # are left out. Where the first line that counts is a JSON
object, every line is one: {"prompt": …} and other fields of the video. `-` is the standard input.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from x2v_jax.checkpoint.files.json_file import is_json_array, is_json_object
from x2v_jax.errors import UserError, did_you_mean
from x2v_jax.request.request import Request

STDIN = "-"
_MOST_BYTES = 256 << 20
_JSON_SUFFIXES = (".jsonl", ".ndjson")
# Beside the fields of a request: where the video goes, and both sizes in one.
_OWN = ("output", "size")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of a file.

    text: the prompt.
    fields: those of a `Request` that the line sets beside it.
    output: where the video goes; "" where the line does not say.
    where: file and line, for sentences.
    """

    text: str
    fields: Mapping[str, object]
    output: str
    where: str


def read_prompts(source: str | os.PathLike[str], field: str) -> tuple[Prompt, ...]:
    """The prompts of a text file or of the standard input.

    Args:
        source: the file, UTF-8; "-" for the standard input.
        field: what sentences call it, such as config.prompt_file.

    Raises:
        UserError: it cannot be read, holds no prompt, or a line of JSON cannot be understood; with the line's number.
    """
    name = "standard input" if os.fspath(source) == STDIN else os.fspath(source)
    lines = re.split(r"\r\n|\n|\r", _text(source, name, field))  # other separators may be part of a prompt
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    counting = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not counting:
        raise UserError(f"{field}: {name} has no prompt in it; write one a line")
    is_json = name.lower().endswith(_JSON_SUFFIXES) or is_json_object(_parsed(counting[0][1]))
    if not is_json:
        return tuple(Prompt(line, {}, "", f"{name}, line {number}") for number, line in counting)
    folder = pathlib.Path() if name != os.fspath(source) else pathlib.Path(source).expanduser().parent
    return tuple(_entry(line, f"{name}, line {number}", field, folder) for number, line in counting)


def unused_fields(prompts: Sequence[Prompt], used: Sequence[str] = ()) -> list[str]:
    """Names that lines set and that a program which wants no more than `used` leaves out, for a note."""
    found = {name for prompt in prompts for name in [*prompt.fields, *(["output"] if prompt.output else [])]}
    return sorted(found - set(used))


def _text(source: str | os.PathLike[str], name: str, field: str) -> str:
    try:
        if os.fspath(source) == STDIN:
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            path = pathlib.Path(source).expanduser()
            if path.is_dir():
                raise UserError(f"{field}: {name} is a folder; give a text file with one prompt a line")
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: {name[:200]} cannot be read: {why}; mend the path") from None
    if len(data) > _MOST_BYTES:
        raise UserError(f"{field}: {name} is larger than {_MOST_BYTES >> 20} MB; give a text file of prompts")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{field}: {name}, line {line} is not UTF-8 text; save it as UTF-8, one prompt a line"
        ) from None


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _entry(line: str, where: str, field: str, folder: pathlib.Path) -> Prompt:
    values = _parsed(line)
    if not is_json_object(values):
        raise UserError(f'{field}: {where} is no JSON object as the others are; write {{"prompt": "a cat", "seed": 1}}')
    known = (*Request.field_names(), *_OWN)
    for name in values:
        if name not in known:
            advice = did_you_mean(name, known, f"known are {', '.join(known)}")
            raise UserError(f"{field}: {where} has the key {name!r}; {advice}")
    text, output = values.pop("prompt", None), values.pop("output", "")
    if not isinstance(text, str):
        raise UserError(f'{field}: {where} has {"no" if text is None else "a strange"} prompt; write "prompt": "a cat"')
    if not isinstance(output, str):
        raise UserError(f"{field}: {where} has the output {output!r}; give a file's name")
    if (size := values.pop("size", None)) is not None:
        if "height" in values or "width" in values:
            raise UserError(f"{field}: {where} has size and height or width; leave one out")
        values["height"], values["width"] = _size(size, where, field)
    for name in ("image", "initial_noise", "text_embeddings", "continue_from"):
        value = values.get(name)
        if isinstance(value, str) and (folder / value).exists():
            values[name] = str(folder / value)
    return Prompt(text, values, output, where)


def _size(size: object, where: str, field: str) -> tuple[int, int]:
    """Height and width from "480x832", [480, 832] or {"height": 480, "width": 832}."""
    parts: list[object] = []
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d{1,6})\s*[x*×]\s*(\d{1,6})\s*", size)):
        parts = [int(match[1]), int(match[2])]
    elif is_json_array(size):
        parts = size
    elif is_json_object(size) and size.keys() == {"height", "width"}:
        parts = [size["height"], size["width"]]
    numbers = [part for part in parts if isinstance(part, int) and not isinstance(part, bool)]
    if len(parts) != 2 or len(numbers) != 2:
        raise UserError(f'{field}: {where} has the size {size!r}; write "480x832", height and width')
    return numbers[0], numbers[1]
