"""One network of a checkpoint on the device: its structure at once, its weights when first needed, until released."""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from x2v_jax.checkpoint import lora, names
from x2v_jax.checkpoint.store import NativeCheckpoint
from x2v_jax.checkpoint.tensors import LazyTensor
from x2v_jax.memory import device_dtype
from x2v_jax.models import functional
from x2v_jax.models.clip import ClipVisionTower
from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.umt5 import Umt5Encoder
from x2v_jax.models.vae import WanVae
from x2v_jax.models.wan import WanModel
from x2v_jax.request_fields import as_config

_NETWORKS: Mapping[str, tuple[type, Callable[..., Any]]] = {
    "transformer": (WanConfig, WanModel),
    "vae": (VaeConfig, WanVae),
    "text_encoder": (Umt5Config, Umt5Encoder),
    "image_encoder": (ClipConfig, ClipVisionTower),
}

# A file, or a file and the strength that it is merged with.
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


class Network:
    """A network whose weights come and go.

    Args:
        component: its name in the checkpoint.
        config: as `NativeCheckpoint.config` gives it.
        tensors: its weights as `NativeCheckpoint.tensors` gives (and has checked) them; read when they are loaded.
        dtype: "bfloat16" or "float32". The VAE always runs in float32: half precision shows as banding.
    """

    def __init__(self, component: str, config: Any, tensors: Mapping[str, LazyTensor], *, dtype: str):
        config_class, make = _NETWORKS[component]
        self.component = component
        self.config = as_config(config_class, config)
        compute = jnp.float32 if component == "vae" else jnp.dtype(dtype)
        self.graphdef, _ = functional.abstract(
            lambda: make(self.config, rngs=nnx.Rngs(0), dtype=compute)  # the numbers are never drawn
        )
        self._tensors = tensors
        self._dtype = dtype
        self._params: functional.Params | None = None

    @property
    def is_loaded(self) -> bool:
        return self._params is not None

    def load(self) -> functional.Params:
        """The parameters on the device, read from the file unless they are there already.

        Raises:
            UserError: a weight is stored in a type that is not a plain float.
        """
        if self._params is None:
            placed = {name: self._place(name, tensor) for name, tensor in self._tensors.items()}
            self._params = functional.unflatten(placed)
        return self._params

    def release(self) -> None:
        """Lets the device have its memory back; a later `load` reads the file again."""
        self._params = None
        gc.collect()

    def _place(self, name: str, tensor: LazyTensor) -> jax.Array:
        wanted = device_dtype(self.component, name, tensor.dtype, self._dtype)
        values = tensor.read()
        # Cast on the host, so that the device never holds a weight twice; one at a time, so that neither does the host.
        return jax.device_put(np.asarray(values, wanted)).block_until_ready()


def describe_networks(
    checkpoint: NativeCheckpoint, loras: Sequence[Lora], *, dtype: str
) -> tuple[dict[str, Network], lora.LoraReport | None]:
    """The networks that a checkpoint has, by component, none of them loaded; LoRAs are merged into the transformer.

    Raises:
        UserError: the checkpoint is damaged, or a LoRA does not fit it.
    """
    networks, report = {}, None
    for name in (name for name in _NETWORKS if checkpoint.has(name)):
        tensors = checkpoint.tensors(name)
        if name == "transformer" and loras:
            files = [(lora.LoraFile.open(path), strength) for path, strength in map(_lora_pair, loras)]
            rows = names.table(name, checkpoint.config(name))
            tensors, report = lora.merge_into_native(tensors, files, rows)
        networks[name] = Network(name, checkpoint.config(name), tensors, dtype=dtype)
    return networks, report


def _lora_pair(entry: Lora) -> tuple[str | os.PathLike[str], float]:
    return (entry[0], float(entry[1])) if isinstance(entry, tuple | list) else (entry, 1.0)
