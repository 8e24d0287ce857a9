"""Which videos a run is asked for: prompts with their own fields, times pictures, times seeds; and which are there."""

import dataclasses
import glob
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from x2v_jax.errors import UserError
from x2v_jax.request import Request
from x2v_jax.request.prompt_file import Prompt, read_prompts

EXISTING = ("rename", "skip", "overwrite")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic")
# What a video that is there has to agree in with the one that is asked for.
_TOLD = ("prompt", "negative_prompt", "seed", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One video: fields of its request beside the config's.

    output: where it goes, if its line says so. name: of its picture, where there are several. where: its line.
    """

    text: str
    fields: Mapping[str, Any]
    output: str = ""
    name: str = ""
    where: str = ""


def asked_videos(config: Any) -> list[Asked]:
    """Every prompt with every picture, num_videos times with seeds one after the other.

    Raises:
        UserError: the file of prompts, or the folder or pattern of pictures, has nothing for it.
    """
    prompts = (Prompt(config.prompt, {}, "", ""),)
    if config.prompt_file is not None:
        prompts = read_prompts(config.prompt_file, "config.prompt_file")
    pictures = _pictures(config.image)
    found: list[Asked] = []
    for prompt in prompts:
        own = "image" in prompt.fields
        for picture in [None] if own or not pictures else pictures:
            image = {} if picture is None else {"image": picture}
            name = pathlib.Path(picture).stem if picture is not None and len(pictures) > 1 else ""
            for offset in range(config.num_videos):
                fields = dict(image | dict(prompt.fields))
                seed = fields.get("seed", None if config.seed == -1 else config.seed)
                seed = None if seed == -1 else seed
                fields["seed"] = seed + offset if isinstance(seed, int) and not isinstance(seed, bool) else seed
                output = prompt.output
                if output and (config.num_videos > 1 or name):
                    path = pathlib.PurePath(output)
                    number = str(offset + 1) if config.num_videos > 1 else ""
                    tail = "".join(f"-{part}" for part in (name, number) if part)
                    output = str(path.with_name(f"{path.stem}{tail}{path.suffix}"))
                found.append(Asked(prompt.text, fields, output, name, prompt.where))
    return found


def _pictures(image: str | None) -> list[str]:
    """The pictures that config.image names: one, those of a folder, or those that a pattern fits; in order of names."""
    if not image:
        return []
    path = pathlib.Path(image).expanduser()
    try:
        is_folder, is_pattern = path.is_dir(), not path.exists() and any(sign in image for sign in "*?[")
    except OSError:  # too long a name: `resolve` says so
        return [image]
    if is_folder:
        found = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in _PICTURES and entry.is_file())
        if not found:
            raise UserError(f"config.image: there is no picture in the folder {image}; give another, or one picture")
        return found
    if is_pattern:
        found = sorted(name for name in glob.glob(str(path), recursive=True) if pathlib.Path(name).is_file())
        if not found:
            raise UserError(f"config.image: no file fits {image!r}; mend the pattern")
        return found
    return [image]


def is_there(path: pathlib.Path, completed: Request) -> bool:
    """Whether a video was made whole under this name. Warns where it is another one than is asked for."""
    try:
        values = json.loads(path.with_suffix(".json").read_bytes())
        config = values["config"]
        if not path.is_file() or values.get("interrupted"):
            return False
        differing = [name for name in _TOLD if name in config and config[name] != getattr(completed, name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # without its settings it was never finished, or was another program's
    if differing:
        warnings.warn(
            f"{path} is there and was made with another {', '.join(differing)}; it is kept. Give another output, or "
            "existing=overwrite",
            stacklevel=2,
        )
    return True
