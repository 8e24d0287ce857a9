"""Says whether two checkpoints hold the same network, without reading all of it."""

import hashlib
import json
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from x2v_jax import shipped
from x2v_jax.errors import UserError

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint

_SAMPLE = 1024


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
