"""Writes native checkpoints: a folder that appears under its name only when everything in it is complete."""

import contextlib
import glob
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import Streamed
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.names.smoothing import smoothing_shapes
from x2v_jax.checkpoint.names.wan import native_shapes, parameter_count
from x2v_jax.errors import UserError
from x2v_jax.models.config import Config, Schedule

FORMAT = "x2v-jax"
# The version that holds smoothed 8-bit weights. Checkpoints without such, or without any 8-bit weights, are written as
# the version that held them first, so that older programs read what they can run and refuse the rest.
FORMAT_VERSION = 3
_FORMAT_VERSION_OF_8_BITS = 2
_FORMAT_VERSION_OF_FLOATS = 1
FAMILY = "wan2.1"
MODEL_FILE = "model.json"
TOKENIZER_FILE = "tokenizer.json"
SHARD_BYTES = 5_000_000_000


class _PieceWriter(SafetensorsWriter):
    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Writes a whole tensor from pieces along axis 0, so that a large one never is in memory as a whole."""
        shape, dtype = self._spec(name)
        position = 0
        for piece in pieces:
            if piece.shape[1:] != shape[1:]:
                raise ValueError(f"{self.path}: a piece of {name!r} has shape {piece.shape}, the tensor {shape}")
            self._put(name, position, piece, piece.shape, dtype)
            position += piece.nbytes
        if position != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self.path}: the pieces of {name!r} do not add up to shape {shape}")
        del self._missing[name]


@contextlib.contextmanager
def complete_folder(path: pathlib.Path, *, overwrite: bool = False, nbytes: int = 0) -> Iterator[pathlib.Path]:
    """A context that gives a fresh folder to fill; at its end that folder gets the name `path`.

    After an error the unfinished folder is removed. After a kill it stays beside `path` as NAME.tmp-PID, and the next
    attempt removes it.

    Args:
        overwrite: replace a native checkpoint that is there.
        nbytes: what will be written at least, to notice a full disk at the beginning and not after an hour.

    Raises:
        UserError: `path` exists (unless `overwrite` and it is a native checkpoint), or cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))
    with contextlib.suppress(OSError):
        _sweep(path)
    check_destination(path, overwrite)
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise UserError(f"{path}: needs {nbytes:,} bytes and {free:,} are free; free space or choose another disk")
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        unfinished.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another destination") from None
    try:
        yield unfinished
        _sync(unfinished)
        _put_in_place(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: writing failed ({error.strerror}); nothing is left there") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not path.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _put_in_place(unfinished: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a folder its name. What has the name is removed after that, and gets it back where that fails."""
    if not path.exists():
        unfinished.rename(path)
        return
    replaced = path.with_name(f"{path.name}.old-{os.getpid()}")
    try:
        path.rename(replaced)
        unfinished.rename(path)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_destination(path: pathlib.Path, overwrite: bool) -> None:
    """Raises a UserError when something is at `path` that may not be replaced. An empty folder may."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not (path / MODEL_FILE).is_file():
        raise UserError(
            f"{path} exists and is not a converted checkpoint, so it is not replaced; choose another destination or "
            "move it away"
        )
    if not overwrite:
        raise UserError(f"{path} exists; choose another destination or give --overwrite")


def _sweep(path: pathlib.Path) -> None:
    """Removes what a killed attempt at the same destination left, or puts back what it was replacing."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*-*"):
        match = re.fullmatch(r".*\.(tmp|old)-(\d+)", left.name)
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that cannot sync a folder
    finally:
        os.close(descriptor)


def write_component(
    folder: pathlib.Path,
    component: str,
    config: Config,
    tensors: Mapping[str, Streamed],
    *,
    quantization: str | None = None,
    smoothed: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, object]:
    """Writes the tensors of one component, in the order given, and returns its entry for model.json.

    A shard takes tensors in order until it is full. A tensor is never split: one above the limit has its own shard.
    """
    check_names(component, config, {name: tensor.shape for name, tensor in tensors.items()}, quantization, smoothed)
    shards = _shards(tensors, shard_bytes)
    files = []
    for number, names in enumerate(shards, 1):
        name = f"{component}.safetensors"
        if len(shards) > 1:
            name = f"{component}-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(name)
        specs = {n: (tensors[n].shape, tensors[n].dtype) for n in names}
        with _PieceWriter(folder / name, specs, {"format": FORMAT, "component": component}) as writer:
            for tensor_name in names:
                writer.write_pieces(tensor_name, _counted(tensors[tensor_name].pieces(), on_bytes))
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    return {
        "config": config.to_dict(),
        "dtype": max(sizes, key=lambda d: sizes[d]),
        "files": files,
        "parameters": parameter_count(component, config),
    }


def check_names(
    component: str,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: str | None = None,
    smoothed: bool = False,
) -> None:
    """Raises a UserError that names every parameter that is missing, unknown or of another shape."""
    expected = native_shapes(component, config, quantization) | (smoothing_shapes(config) if smoothed else {})
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [f"{name} is unknown" for name in shapes if name not in expected]
    wrong += [
        f"{name} has shape {list(shapes[name])} and needs {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if wrong:
        raise UserError(f"{component}: {'; '.join(wrong)}")


def _shards(tensors: Mapping[str, Streamed], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _counted(pieces: Iterable[np.ndarray], on_bytes: Callable[[int], None]) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece
        on_bytes(piece.nbytes)


def write_model_json(
    folder: pathlib.Path,
    *,
    task: str | None,
    variant: str,
    schedule: Schedule,
    components: Mapping[str, object],
    provenance: Mapping[str, object],
    quantization: Mapping[str, str] | None = None,
    smoothing: Mapping[str, float] | None = None,
) -> None:
    """quantization: component -> "int8" or "float8_e4m3fn", of those in 8 bits. smoothing: component -> alpha."""
    quantized: dict[str, dict[str, Any]] = {name: {"dtype": dtype} for name, dtype in (quantization or {}).items()}
    for name, alpha in (smoothing or {}).items():
        quantized[name]["smoothing"] = alpha
    version = FORMAT_VERSION if smoothing else _FORMAT_VERSION_OF_8_BITS if quantized else _FORMAT_VERSION_OF_FLOATS
    model = {
        "format": FORMAT,
        "format_version": version,
        "family": FAMILY,
        "task": task,
        "variant": variant,
        "components": dict(components),
        "schedule": schedule.to_dict(),
        "quantization": quantized or None,
        "provenance": dict(provenance),
    }
    path = folder / MODEL_FILE
    with path.open("w", encoding="utf-8") as file:
        json.dump(model, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def save_native(
    path: str | pathlib.Path,
    *,
    task: str | None,
    variant: str,
    schedule: Schedule,
    components: Mapping[str, tuple[Config, Mapping[str, object]]],
    tokenizer_file: str | pathlib.Path | None = None,
    provenance: Mapping[str, object] | None = None,
    references: Mapping[str, str] | None = None,
    quantization: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a native checkpoint from arrays in memory (what trainers do).

    Args:
        path: the folder; it appears only when it is complete.
        components: name -> (config, parameters by their flat names, as `models.functional.flatten` gives them).
        tokenizer_file: a tokenizer.json to copy in.
        references: name -> path of another native checkpoint that holds the component.
        quantization: name -> 8-bit type of the components whose blocks have `weight` and `scale` for `kernel`.

    Raises:
        UserError: the path exists, cannot be written, or parameters do not fit their config.
    """
    with complete_folder(pathlib.Path(path), overwrite=overwrite) as folder:
        entries: dict[str, Any] = {
            name: write_component(
                folder,
                name,
                config,
                {k: Streamed.of(v) for k, v in sorted(flat.items())},
                quantization=(quantization or {}).get(name),
            )
            for name, (config, flat) in components.items()
        }
        entries |= {name: {"reference": target} for name, target in (references or {}).items()}
        if tokenizer_file is not None:
            entries["tokenizer"] = copy_tokenizer(pathlib.Path(tokenizer_file), folder)
        write_model_json(
            folder,
            task=task,
            variant=variant,
            schedule=schedule,
            components=entries,
            provenance=provenance or {"sources": [], "command": None, "version": None, "loras": []},
            quantization=quantization,
        )


def copy_tokenizer(file: pathlib.Path, folder: pathlib.Path) -> dict[str, object]:
    """Copies a tokenizer.json into a checkpoint and returns its entry for model.json."""
    try:
        shutil.copyfile(file, folder / TOKENIZER_FILE)
    except OSError as error:
        raise UserError(f"{file}: the tokenizer cannot be copied ({error.strerror})") from None
    return {"files": [TOKENIZER_FILE]}
