"""Networks of random weights that are made on the device: sizes and types of the published ones, no files."""

import gc
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.generate.network import Network
from x2v_jax.models import functional
from x2v_jax.models.config import CONFIGS
from x2v_jax.models.networks import abstract_network

# Standard deviations of the values of 8-bit matrices.
_INT8_SPREAD, _E4M3_SPREAD = 40.0, 100.0
# A prime, so that rows of a matrix differ.
_PAGE = 1_048_583


class RandomNetwork(Network):
    """A network as a checkpoint in bfloat16, or with 8-bit matrices, would give it.

    Args:
        config: WanConfig, VaeConfig, Umt5Config or ClipConfig.
        options: of `Network`: dtype, vae_dtype, quantization, ops.
    """

    def __init__(self, config: Any, *, seed: int = 0, dtype: str = "bfloat16", **options: Any):
        component = next(name for name, of in CONFIGS.items() if type(config) is of)
        stored: dict[str, Any] = {} if component == "vae" else {"quantization": options.get("quantization")}
        shapes = abstract_network(config, param_dtype=jnp.bfloat16, **stored)[1]
        tensors: Any = {
            name: types.SimpleNamespace(shape=leaf.shape, dtype=np.dtype(leaf.dtype))
            for name, leaf in functional.flatten(shapes).items()
        }
        lazy: Mapping[str, LazyTensor] = tensors
        super().__init__(component, config, lazy, dtype=dtype, **options)
        self._seed = seed

    def load(self) -> functional.Params:
        """Draws the weights on the device, unless they are there."""
        if self._params is None:
            self._params = random_params(self.shapes, self._seed)
        return self._params

    def release(self) -> None:
        """Gives the memory back at once, whoever still holds the tree."""
        if self._params is not None:
            for leaf in jax.tree.leaves(self._params):
                leaf.delete()
        self._params = None
        gc.collect()


def random_params(shapes: functional.Params, seed: int = 0) -> functional.Params:
    """A tree of weights for a tree of shapes, such that activations keep their size from layer to layer.

    All are drawn from one page of random numbers, again and again: what they are does not change how long anything
    takes, and to draw 14 billion would.
    """
    flat = functional.flatten(shapes)
    quantized = {name.removesuffix(".weight") for name, leaf in flat.items() if _bits(leaf.dtype) == 8}

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        page = jax.random.normal(key, (_PAGE,))
        drawn = {}
        for name, leaf in flat.items():
            matrix = flat[f"{name.rpartition('.')[0]}.weight"] if _is_scale(name, quantized) else None
            drawn[name] = _fill(page, leaf, _kind(name), matrix)
        return drawn

    return functional.unflatten(jax.jit(draw)(jax.random.key(seed)))


def _kind(name: str) -> str:
    leaf = name.rpartition(".")[2]
    if leaf in ("scale", "gamma"):
        return "ones"
    return "zeros" if leaf == "bias" else "matrix"


def _is_scale(name: str, quantized: set[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "scale" and owner in quantized


def _fill(page: jax.Array, leaf: Any, kind: str, scales: Any) -> jax.Array:
    """scales: the 8-bit matrix that the leaf holds the scales of."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype).name
    if scales is not None:
        # What brings the product with a matrix of this spread back to size 1.
        spread = _INT8_SPREAD if scales.dtype == jnp.int8 else _E4M3_SPREAD
        return jnp.full(shape, 1 / (spread * math.sqrt(scales.shape[-1])), jnp.float32)
    if kind in ("ones", "zeros"):
        return jnp.full(shape, float(kind == "ones"), dtype)
    if dtype == "int8":
        page = jnp.clip(jnp.round(_INT8_SPREAD * page), -127, 127)
    elif _bits(dtype) == 8:
        page = jnp.clip(_E4M3_SPREAD * page, -448, 448)
    else:
        # Kernels are [..., in, out]: those of the blocks have the layer in front, those of convolutions the window.
        inputs = math.prod(shape[:-1]) if len(shape) != 3 else shape[-2]
        page = page / math.sqrt(max(inputs, 1))
    size = math.prod(shape)
    pages = jnp.broadcast_to(page.astype(dtype), (-(-size // _PAGE), _PAGE))
    return pages.reshape(-1)[:size].reshape(shape)


def _bits(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize
