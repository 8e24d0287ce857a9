"""`--rerun`: the settings that a video carries, and where the files that they name are now.

The mp4 names files relative to where it was made, or only by their names, and has their digests; the JSON beside it has
the folder in which it was made too.
"""

import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.checkpoint.lora.arguments import lora_pairs
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.checkpoint.native.writer import MODEL_FILE
from x2v_jax.config import flags
from x2v_jax.config.inference import inference_config
from x2v_jax.errors import UserError

# Keys that name one file whose content decides the result.
INPUTS = ("image", "initial_noise", "text_embeddings", "continue_from")
# How much two files' folders have in common before a path between them is written down: less would tell of the machine.
_COMMON_PARTS = 3


@dataclasses.dataclass
class Recorded:
    """A video's settings. folder: where it was made, "" where only the mp4 is left. digests: of then, by path now."""

    source: str
    values: dict[str, Any]
    folder: str
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def model_sha256(self) -> object:
        return self.values.get("model_sha256")

    def config(self, overrides: Mapping[str, Any]) -> Any:
        """The config that the video was made with, with the files where they are now, and with `overrides`.

        Raises:
            UserError: a file that it names is not there, and is not among the overrides.
        """
        config: Any = inference_config()
        for name, value in self.values["config"].items():
            if name not in config:
                warnings.warn(
                    f"{name}={value!r} of {self.source} is ignored: this version has no such key", stacklevel=2
                )
            elif value is not None:
                flags.set_key(config, name, value)
        for name in ("checkpoint", *INPUTS):
            if config[name] and name not in overrides:
                config[name] = self._found(name, config[name])
        if "lora" not in overrides:
            loras = lora_pairs(config.lora, "config.lora")
            config.lora = tuple((self._found("lora", path), strength) for path, strength in loras)
        config.output = _video_of(self.source)
        for name, value in overrides.items():
            flags.set_key(config, name, value)
        return config

    def warn_of_changes(self, inputs: Mapping[str, str], checkpoint: NativeCheckpoint) -> None:
        """Says which of the files are not what they were."""
        for path, digest in self.digests.items():
            if path in inputs and inputs[path] != digest:
                warnings.warn(f"{path} has changed since that video was made; this one will differ", stacklevel=3)
        if self.model_sha256 not in (None, sha256(checkpoint.path / MODEL_FILE)):
            warnings.warn(
                f"{checkpoint.path} is not the checkpoint that made that video; this one will differ", stacklevel=3
            )

    def _found(self, key: str, name: str) -> str:
        """Where a file or a checkpoint is that the video names: the one with its digest, else the first there is."""
        digest = self.model_sha256 if key == "checkpoint" else _of(self.values.get("inputs"), name)
        places = [name, os.path.join(self.folder, name) if self.folder else name, shipped.locate(name, typed=False)]
        there = [place for place in dict.fromkeys(places) if os.path.exists(os.path.expanduser(place))]
        if not there:
            where = f"nor in {self.folder}, where the video was made" if self.folder else "where it was relative to"
            raise UserError(f"--rerun {self.source}: its {key} {name!r} is neither here {where}; give --config.{key}=…")
        path = next((place for place in there if _digest(place) == digest), there[0])
        if isinstance(digest, str) and key != "checkpoint":
            self.digests[path] = digest
        return path


def read(path: str) -> Recorded:
    """The settings of a video: of the mp4 itself, or of the JSON beside it, either of which may be given.

    Raises:
        UserError: there are none.
    """
    from x2v_jax.media.video import read_metadata

    file = pathlib.Path(path)
    beside = _json(file.with_suffix(".json"))
    if file.suffix.lower() == ".json":
        if beside is None:
            raise _no_settings(path)
        return _recorded(path, beside)
    carried: dict[str, Any] | None = None
    try:
        carried = dict(read_metadata(path))
    except UserError:
        if beside is None or not file.is_file():
            raise
    if carried is None or (beside is not None and _plain(beside) == _plain(carried)):
        assert beside is not None
        return _recorded(path, beside)
    return _recorded(path, carried)


def portable_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> what the mp4 calls it: relative where it lies near, its name where it lies elsewhere on the machine.

    What is shipped has its own name everywhere. No two paths have one name.
    """
    names: dict[str, str] = {}
    for path in paths:
        name = shipped.recorded(path)
        if name == path and os.path.isabs(os.path.expanduser(path)):
            name = _near(os.path.expanduser(path))
        count = 1
        while name in names.values():
            count += 1
            name = f"{count}/{os.path.basename(path)}"
        names[path] = name
    return names


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _near(path: str) -> str:
    here = os.getcwd()
    try:
        common = os.path.commonpath([path, here])
    except ValueError:  # another drive
        return os.path.basename(path)
    is_near = common == here or len(pathlib.PurePath(common).parts) >= _COMMON_PARTS
    return os.path.relpath(path, here) if is_near else os.path.basename(os.path.normpath(path))


def _recorded(path: str, values: dict[str, Any]) -> Recorded:
    if not isinstance(values.get("config"), dict):
        raise _no_settings(path)
    folder = values.get("folder")
    return Recorded(path, values, folder if isinstance(folder, str) else "")


def _no_settings(path: str) -> UserError:
    return UserError(
        f"{path} carries no settings of this program; give an mp4 as `{shipped.command('infer')}` wrote it"
    )


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_json(path) if path.is_file() else None
    except UserError:
        return None  # the mp4 has them


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what the mp4 and the JSON beside it say differently: paths, and what is known at the end."""
    config = {key: value for key, value in values["config"].items() if key not in ("checkpoint", "lora", *INPUTS)}
    left_out = ("config", "folder", "inputs", "size", "interrupted")
    return {key: value for key, value in values.items() if key not in left_out} | {"config": config}


def _video_of(path: str) -> str:
    file = pathlib.Path(path)
    if file.suffix.lower() != ".json":
        return path
    written = (file.with_suffix(suffix) for suffix in (".gif", ".webp", ".png"))
    return str(next((video for video in written if video.is_file()), file.with_suffix(".mp4")))


def _of(inputs: object, name: str) -> object:
    return inputs.get(name) if isinstance(inputs, dict) else None


def _digest(path: str) -> str | None:
    file = pathlib.Path(path).expanduser()
    file = file / MODEL_FILE if file.is_dir() else file
    return sha256(file) if file.is_file() else None
