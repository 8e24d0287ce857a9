"""Tensors in files: exchanged with other implementations, from the same noise and text, or kept block by block.

Files are safetensors with channels first, as PyTorch programs write them; arrays here are channels last. No jax import.
"""

import os
import pathlib
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

import einops
import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_safetensors
from x2v_jax.errors import UserError

Path = str | os.PathLike[str]


def read_noise(path: Path, shape: Sequence[int], num_steps: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The noise a request starts from, and the noise it adds between steps.

    Args:
        path: safetensors with `noise` [C, F, H, W] and optionally `renoise` [num_steps - 1, C, F, H, W].
        shape: [F, H, W, C] of the latents.
        num_steps: steps of the step-distill sampler; None for a sampler that adds no noise.

    Returns:
        float32 noise [F, H, W, C] and renoise [num_steps - 1, F, H, W, C] or None.

    Raises:
        UserError: no such tensor, another shape, or values that are not finite.
    """
    tensors = _read(path, "initial_noise", {"noise", "renoise"}, required="noise")
    first = (shape[-1], *shape[:-1])
    noise = _values(tensors, "noise", path, first)
    if "renoise" not in tensors:
        return _channels_last(noise), None
    if num_steps is None:
        raise UserError(f"initial_noise: {path} holds renoise, but UniPC adds no noise between steps; take it out")
    renoise = _values(tensors, "renoise", path, (num_steps - 1, *first))
    return _channels_last(noise), _channels_last(renoise)


def checked_noise(noise: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Noise [C, F, H, W] of a caller as float32 [F, H, W, C].

    Args:
        shape: [F, H, W, C] of the latents.

    Raises:
        UserError: another shape, or values that are not finite.
    """
    wanted = (shape[-1], *shape[:-1])
    if noise.shape != wanted:
        raise UserError(f"initial_noise (latents) is {list(noise.shape)}; this video starts from {list(wanted)}")
    if noise.dtype.kind != "f" or not np.isfinite(noise).all():
        raise UserError("initial_noise (latents) holds NaN, infinity or no floats; give standard normal noise")
    return _channels_last(noise.astype(np.float32))


class BlockNoise:
    """The noise of a block-by-block video from a file, read block by block.

    Args:
        path: safetensors with `noise` [blocks, frames, C, H, W] and optionally `renoise`, [blocks, num_steps - 1,
            frames, C, H, W].
        num_blocks: how many blocks are made.
        shape: [frames, H, W, C] of a block.

    Raises:
        UserError: no such tensor, another shape, or values that are not finite.
    """

    def __init__(self, path: Path, num_blocks: int, shape: Sequence[int], num_steps: int):
        self._tensors = _read(path, "initial_noise", {"noise", "renoise"}, required="noise")
        frames, height, width, channels = shape
        one = (frames, channels, height, width)
        expected = {"noise": (num_blocks, *one), "renoise": (num_blocks, num_steps - 1, *one)}
        for name, tensor in self._tensors.items():
            _check_shape(name, tensor, path, expected[name])
            for block in tensor.read():
                _check_finite(name, block, path)

    @property
    def has_renoise(self) -> bool:
        return "renoise" in self._tensors

    def noise(self, block: int) -> np.ndarray:
        """float32 [frames, H, W, C]: what a block starts from."""
        return self._block("noise", block)

    def renoise(self, block: int) -> np.ndarray:
        """float32 [num_steps - 1, frames, H, W, C]: what is added to it between steps."""
        return self._block("renoise", block)

    def _block(self, name: str, block: int) -> np.ndarray:
        block_values = np.asarray(self._tensors[name].read()[block], np.float32)
        return einops.rearrange(block_values, "... c h w -> ... h w c")


def read_text_embeddings(path: Path, text_len: int, text_dim: int) -> dict[str, np.ndarray]:
    """`text` and, where it is there, `negative_text`: each [L, text_dim] with L <= text_len, padded with zeros.

    Returns:
        float32 arrays [text_len, text_dim] by name.

    Raises:
        UserError: no `text`, another width, too many rows, or values that are not finite.
    """
    tensors = _read(path, "text_embeddings", {"text", "negative_text"}, required="text")
    result: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or tensor.shape[1] != text_dim or not 1 <= tensor.shape[0] <= text_len:
            raise UserError(
                f"text_embeddings: {name} of {path} is {list(tensor.shape)}; this model takes [L, {text_dim}] with L "
                f"from 1 to {text_len}"
            )
        result[name] = np.zeros((text_len, text_dim), np.float32)
        result[name][: tensor.shape[0]] = _values(tensors, name, path, tensor.shape)
    return result


def write_latents(
    path: Path,
    latents: np.ndarray,
    metadata: Mapping[str, str] | None = None,
    *,
    context: np.ndarray | None = None,
) -> None:
    """Writes `latents` [C, F, H, W] from [F, H, W, C], float32. Missing folders are made.

    Args:
        latents: may be a memory map: it is read channel by channel.
        metadata: for the header; `Block.state` makes it a file that `continue_from` takes.
        context: the latents before these, [f, H, W, C], where the video continues another.

    Raises:
        UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    arrays = {"latents": latents} | ({} if context is None else {"context": context})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"save_latents: {path} cannot be written: {error.strerror}; choose another place") from None
    specs = {name: ((a.shape[-1], *a.shape[:-1]), np.float32) for name, a in arrays.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in arrays.items():
            for channel in range(array.shape[-1]):
                writer.write_part(name, channel, np.ascontiguousarray(array[..., channel], np.float32))


def _read(path: Path, field: str, known: set[str], *, required: str) -> dict[str, LazyTensor]:
    try:
        tensors = read_safetensors(path)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    if required not in tensors:
        raise UserError(
            f"{field}: {path} has no tensor {required!r} (it has {', '.join(sorted(tensors)) or 'none'}); rename it"
        )
    if unknown := sorted(tensors.keys() - known):
        raise UserError(f"{field}: {path} holds {unknown[0]!r}; it may hold {' and '.join(sorted(known))} only")
    return tensors


def _channels_last(values: np.ndarray) -> np.ndarray:
    return einops.rearrange(values, "... c f h w -> ... f h w c")


def _values(tensors: Mapping[str, LazyTensor], name: str, path: Path, shape: Sequence[int]) -> np.ndarray:
    tensor = tensors[name]
    _check_shape(name, tensor, path, shape)
    values = np.asarray(tensor.read(), np.float32)
    _check_finite(name, values, path)
    return values


def _check_shape(name: str, tensor: LazyTensor, path: Path, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{name} of {path} is {list(tensor.shape)}; this request needs {list(shape)}")


def _check_finite(name: str, values: np.ndarray, path: Path) -> None:
    # As float32: NumPy does not know whether 8-bit floats are finite.
    if not np.isfinite(np.asarray(values, np.float32)).all():
        raise UserError(f"{name} of {path} holds NaN or infinity; write it again")


class LatentsFile:
    """A context that takes blocks of latents; the file appears at its end, with what there is by then.

    Channels come first in the file and frames in the video, so blocks wait in an unnamed file on the same disk.

    Args:
        path: the final name. Missing folders are made.
        context: latents [f, h, w, C] that the video goes on from, kept in the file too.
        keep: write only the blocks that are needed to have so many last frames, held in memory; None: all.

    Raises:
        UserError: the disk is full, or nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str], *, context: np.ndarray | None = None, keep: int | None = None):
        self._path = pathlib.Path(path)
        self._context = context
        self._keep = keep
        self._recent: deque[np.ndarray] = deque()
        self._waiting: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._state: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        if self._keep is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._waiting = tempfile.TemporaryFile(dir=self._path.parent)
            except OSError as error:
                raise self._refusal(error) from None
        return self

    def append(self, latents: np.ndarray, state: Mapping[str, str]) -> None:
        """The next block, [f, h, w, C] float32, and the header of a file that ends with it."""
        if self._waiting is not None:
            try:
                self._waiting.write(np.ascontiguousarray(latents, np.float32).data)
            except OSError as error:
                raise self._refusal(error) from None
        else:
            self._recent.append(latents)
            while sum(map(len, self._recent)) - len(self._recent[0]) >= (self._keep or 0):
                self._recent.popleft()
                self._context = None  # no longer what comes just before
        self._shape = latents.shape[1:]
        self._state = state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._state:
                write_latents(self._path, self._latents(), self._state, context=self._context)
        finally:
            if self._waiting is not None:
                self._waiting.close()

    def _latents(self) -> np.ndarray:
        if self._waiting is None:
            return np.concatenate(self._recent)
        try:
            self._waiting.flush()
        except OSError as error:
            raise self._refusal(error) from None
        return np.memmap(self._waiting, np.float32, "r").reshape(-1, *self._shape)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"save_latents: {self._path} cannot be written: {error.strerror}; choose another place")


def holds_latents(path: str | os.PathLike[str]) -> bool:
    """Whether a file is latents by its name, and else a video."""
    return pathlib.Path(path).suffix.lower() == ".safetensors"
