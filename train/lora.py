"""LoRA for training: low-rank pairs beside the kernels of a transformer, as plain functions of plain trees.

    W' = stop_gradient(W) + alpha / rank * down @ up,   W, W' [in, out], down [in, rank], up [rank, out]

`up` begins at zero, so that training begins at the base model. Source: Hu et al., "LoRA" (2021), with peft's
initialisation of `down`. `checkpoint.lora.write.write_lora` writes the result for other programs.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from x2v_jax.errors import UserError, did_you_mean
from x2v_jax.models.functional import Params, flatten, unflatten

ATTENTION_AND_FFN = ("blocks.self_attn", "blocks.cross_attn", "blocks.ffn")

# Flat name of a kernel -> {"down": [L, in, rank], "up": [L, rank, out]}; without L where layers are not stacked.
LoraTree = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: of every pair. alpha: the change is scaled by alpha / rank. targets: names of modules (all kernels in them)
    or kernels, such as "blocks.self_attn", "blocks.cross_attn.q" or "head.linear"."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION_AND_FFN

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora rank is {self.rank}; give 1 or more (32 to 128 is usual)")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise UserError(f"lora alpha is {self.alpha}; give a number that is not 0 (the rank is usual)")
        if not self.targets:
            raise UserError(f"lora targets is empty; name modules, for instance {', '.join(ATTENTION_AND_FFN)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init_lora(params: Params, config: LoraConfig, key: jax.Array) -> LoraTree:
    """New pairs that change nothing yet.

    Args:
        params: of the transformer; arrays or `jax.ShapeDtypeStruct`.
        config: rank and targets.
        key: a pair's numbers depend on it and on the kernel's name, not on the other targets.

    Returns:
        float32 pairs by the kernels' flat names.

    Raises:
        UserError: a target names no kernel, or the rank is larger than a kernel.
    """
    lora: LoraTree = {}
    for name, shape in _kernels(params, config).items():
        *layers, inputs, outputs = shape
        if config.rank > min(inputs, outputs):
            raise UserError(
                f"lora rank is {config.rank}, and {name} is {inputs} x {outputs}; give at most {min(inputs, outputs)}"
            )
        bound = 1 / math.sqrt(inputs)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        lora[name] = {
            "down": jax.random.uniform(own, (*layers, inputs, config.rank), jnp.float32, -bound, bound),
            "up": jnp.zeros((*layers, config.rank, outputs), jnp.float32),
        }
    return lora


def apply_lora(params: Params, lora: LoraTree, scale: float, dtype: DTypeLike | None = None) -> Params:
    """The weights with the pairs added: the sum in float32, rounded once.

    Gradients flow to the pairs alone. A low-precision `dtype` rounds changes away that are far smaller than their
    weights (bfloat16 keeps 8 bits): train with float32 kernels, or with pairs large enough.

    Args:
        params: of the frozen base model.
        lora: of `init_lora`.
        scale: `LoraConfig.scale`.
        dtype: of the changed kernels; each kernel's own by default.

    Raises:
        UserError: a pair names no kernel of these weights, or one of another shape.
    """
    flat = {name: jax.lax.stop_gradient(value) for name, value in flatten(params).items()}
    for name, pair in lora.items():
        base = flat.get(name)
        down, up = pair["down"], pair["up"]
        if base is None or base.shape != (*down.shape[:-1], up.shape[-1]):
            found = "does not have" if base is None else f"has as {list(base.shape)}"
            raise UserError(
                f"the LoRA changes {name} by {[*down.shape[:-1], up.shape[-1]]}, which the model {found}; "
                "use it with the model that it was made for"
            )
        change = jnp.einsum("...ir,...ro->...io", down, up, preferred_element_type=jnp.float32, precision="highest")
        flat[name] = (base.astype(jnp.float32) + scale * change).astype(dtype or base.dtype)
    return unflatten(flat)


def _kernels(params: Params, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every kernel that a target names, in order of names."""
    flat = flatten(params)
    known = {n: v.shape for n, v in flat.items() if n.endswith(".kernel") and v.ndim == _ndim(n)}
    chosen = {}
    for target in config.targets:
        own = {n: s for n, s in known.items() if n == target or n.startswith(target.removesuffix(".") + ".")}
        if not own:
            modules = _modules(known)
            advice = did_you_mean(target, modules, f"there are {', '.join(modules[:12])}, …", cutoff=0.5)
            raise UserError(f"lora target {target!r} names no linear layer; {advice}")
        chosen |= own
    return dict(sorted(chosen.items()))


def _ndim(name: str) -> int:
    # The patch embedding's convolution has more axes and is left to full fine-tuning.
    return 3 if name.startswith("blocks.") else 2


def _modules(kernels: Mapping[str, object]) -> list[str]:
    parents = {name.removesuffix(".kernel") for name in kernels}
    return sorted(parents | {parent.rpartition(".")[0] for parent in parents if "." in parent})
