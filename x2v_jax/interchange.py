"""Tensors exchanged with other implementations, so that two of them can be compared from the same noise and text.

Files are safetensors with channels first, as PyTorch programs write them; arrays here are channels last. No jax import.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from x2v_jax.checkpoint.safetensors_file import SafetensorsWriter, read_safetensors
from x2v_jax.checkpoint.tensors import LazyTensor
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
        return np.moveaxis(noise, 0, -1), None
    if num_steps is None:
        raise UserError(f"initial_noise: {path} holds renoise, but UniPC adds no noise between steps; take it out")
    renoise = _values(tensors, "renoise", path, (num_steps - 1, *first))
    return np.moveaxis(noise, 0, -1), np.moveaxis(renoise, 1, -1)


def read_text_embeddings(path: Path, text_len: int, text_dim: int) -> dict[str, np.ndarray]:
    """`text` and, where it is there, `negative_text`: each [L, text_dim] with L <= text_len, padded with zeros.

    Returns:
        float32 arrays [text_len, text_dim] by name.

    Raises:
        UserError: no `text`, another width, too many rows, or values that are not finite.
    """
    tensors = _read(path, "text_embeddings", {"text", "negative_text"}, required="text")
    result = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or tensor.shape[1] != text_dim or not 1 <= tensor.shape[0] <= text_len:
            raise UserError(
                f"text_embeddings: {name} of {path} is {list(tensor.shape)}; this model takes [L, {text_dim}] with L "
                f"from 1 to {text_len}"
            )
        result[name] = np.zeros((text_len, text_dim), np.float32)
        result[name][: tensor.shape[0]] = _values(tensors, name, path, tensor.shape)
    return result


def write_latents(path: Path, latents: np.ndarray) -> None:
    """Writes `latents` [C, F, H, W] from [F, H, W, C], float32. Missing folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    values = np.ascontiguousarray(np.moveaxis(latents, -1, 0), np.float32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"save_latents: {path} cannot be written: {error.strerror}; choose another place") from None
    with SafetensorsWriter(path, {"latents": (values.shape, values.dtype)}) as writer:
        writer.write("latents", values)


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


def _values(tensors: Mapping[str, LazyTensor], name: str, path: Path, shape: Sequence[int]) -> np.ndarray:
    tensor = tensors[name]
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{name} of {path} is {list(tensor.shape)}; this request needs {list(shape)}")
    values = np.asarray(tensor.read(), np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name} of {path} holds NaN or infinity; write it again")
    return values
