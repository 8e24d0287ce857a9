"""Files of recorded activations: for each smoothed input, the largest magnitude of every channel in every layer."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_metadata, read_safetensors, without_advice
from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig

SUFFIX = ".safetensors"
FORMAT = "x2v-jax calibration"
_VERSION = "1"
_COMMAND = f"`{shipped.command('convert calibrate')}`"
# What makes two transformers' activations the same arrays.
_SIZES = ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim")
# What its header tells of the recording itself; a checkpoint that was smoothed by it repeats this.
ABOUT = ("variant", "prompts", "prompts_sha256", "size", "seed")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was recorded while a transformer made videos.

    Attributes:
        maxima: name of the input (see `names.smoothing.GROUPS`) -> [layers, D] float32.
        about: what the header says: the transformer's config (JSON), variant, how many prompts and their SHA-256.
        path: its file.
    """

    maxima: Mapping[str, np.ndarray]
    about: Mapping[str, str]
    path: pathlib.Path

    def check(self, config: WanConfig) -> None:
        """Raises a UserError that names the sizes in which this is not of a transformer of `config`."""
        try:
            recorded = json.loads(self.about["config"])
            theirs = {name: recorded[name] for name in _SIZES}
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self._where}: its header does not say of which sizes it is; calibrate again") from None
        ours = config.to_dict()
        wrong = [f"{n} is {theirs[n]!r} there and {ours[n]!r} here" for n in _SIZES if theirs[n] != ours[n]]
        if wrong:
            raise UserError(
                f"{self._where}: it was recorded with a model of other sizes ({', '.join(wrong)}); give the file that "
                f"{_COMMAND} made with this very model"
            )
        shape = (config.num_layers, config.dim)
        problems = [
            f"{name} has shape {list(found.shape)} and needs {list(shape)}"
            for name, found in self.maxima.items()
            if found.shape != shape
        ]
        problems += [
            f"{name} holds {what}"
            for name, found in self.maxima.items()
            for what, bad in (("NaN or infinity", ~np.isfinite(found)), ("negative numbers", found < 0))
            if bad.any()
        ]
        if problems:
            raise UserError(f"{self._where}: {'; '.join(problems)}; calibrate again")
        if not any(found.any() for found in self.maxima.values()):
            raise UserError(
                f"{self._where}: nothing was recorded, all of its numbers are 0; calibrate again, with prompts of what "
                "the model is to make"
            )

    @property
    def _where(self) -> str:
        return f"--smooth {self.path}"


def check_destination(path: str | os.PathLike[str]) -> pathlib.Path:
    """
    Raises:
        UserError: a calibration cannot be written there.
    """
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"DST is {str(path)!r}; give a file that ends in {SUFFIX}")
    if path.exists():
        raise UserError(f"{path} exists; give another name or move it away")
    if not path.parent.is_dir():
        raise UserError(f"DST is {str(path)!r}, and there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"DST is {str(path)!r}, and {path.parent} cannot be written to; choose another place")
    return path


def write_calibration(calibration: Calibration) -> None:
    """Writes it to its path.

    Raises:
        UserError: the file cannot be written.
    """
    header = {"format": FORMAT, "version": _VERSION, **calibration.about}
    specs = {name: (found.shape, np.dtype(np.float32)) for name, found in calibration.maxima.items()}
    with SafetensorsWriter(calibration.path, specs, header) as writer:
        for name, found in calibration.maxima.items():
            writer.write(name, np.asarray(found, np.float32))


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """
    Raises:
        UserError: it is missing, damaged, or no file of recorded activations.
    """
    if not os.fspath(path):
        raise UserError(f"--smooth is empty; give a file that {_COMMAND} made")
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"--smooth {path}: it is a folder; give the file that {_COMMAND} made, which ends in {SUFFIX}")
    if not path.is_file():
        calibrate = shipped.command(f"convert calibrate CKPT {path}")
        raise UserError(f"--smooth {path}: there is no such file; `{calibrate}` makes one")
    try:
        header: Mapping[str, Any] = read_metadata(path)
        tensors = read_safetensors(path)
    except UserError as error:
        raise UserError(f"--smooth {path}: {_reason(str(error))}; run {_COMMAND} again") from None
    if header.get("format") != FORMAT:
        raise UserError(f"--smooth {path}: it holds no recorded activations; give a file that {_COMMAND} made")
    if header.get("version") != _VERSION:
        raise UserError(
            f"--smooth {path}: its version is {header.get('version')!r}, and this program reads {_VERSION!r}; "
            "calibrate again with this version"
        )
    wrong = [f"{name} is missing" for name in GROUPS if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in GROUPS]
    wrong += [
        f"{name} is {tensor.dtype.name} of shape {list(tensor.shape)} and must be float32 of two axes"
        for name, tensor in tensors.items()
        if name in GROUPS and (tensor.dtype != np.float32 or tensor.ndim != 2)
    ]
    if wrong:
        raise UserError(f"--smooth {path}: {'; '.join(wrong)}; calibrate again")
    return Calibration({name: np.array(t.read()) for name, t in tensors.items()}, header, path)


def _reason(text: str) -> str:
    """What is wrong with a file, without its name, which the sentence begins with."""
    return re.sub(r"\Acannot read '.*?': ", "", without_advice(text), flags=re.DOTALL)
