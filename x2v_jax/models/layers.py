"""Layers that the networks share. Norms and their statistics are float32; matmuls run in the module's `dtype`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """y = x @ kernel + bias. kernel: [in_features, out_features]; computes in `dtype`, returns `dtype`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
    ):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.kernel[...].astype(self.dtype)
        # One matrix of rows: with batch axes kept, XLA's CPU backend transposes element by element in the gradient.
        y = jnp.dot(x.astype(self.dtype).reshape(-1, x.shape[-1]), kernel)
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, with scale and bias."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = normalize(x, self.eps)
        return y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = x.astype(jnp.float32)
        return (
            x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...].astype(jnp.float32)
        )


def normalize(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer normalisation without parameters, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    # The two-pass variance: E[x^2] - E[x]^2 cancels badly on the residual stream, whose mean can be large.
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def stacked(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """`num_layers` blocks as one module whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block))(rngs)


Remat = Literal["none", "attention", "block"]
# What "attention" keeps of a block; see `named_output`.
_ATTENTION_OUTPUT = "attention_output"


def scan_blocks(
    blocks: nnx.Module,
    x: Any,
    apply: Callable[..., Any],
    *,
    last: int | None = None,
    inputs: Any = None,
    remat: Remat = "none",
) -> Any:
    """x -> apply(block, x) over the stacked blocks in order (the first `last` of them, if given). x may be a tree.

    Args:
        inputs: arrays with a leading layer axis; if given, apply(block, x, inputs of the layer) is called.
        remat: what a gradient keeps of a block: all of it ("none"), its input and the outputs of its attentions, or its
            input alone ("block"); the rest is computed again.
    """
    graphdef, params = nnx.split(blocks)
    if last is not None:
        params = jax.tree.map(lambda leaf: leaf[:last], params)

    def step(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, None]:
        block = nnx.merge(graphdef, layer[0])
        return (apply(block, carry) if inputs is None else apply(block, carry, layer[1])), None

    if remat != "none":
        policies = jax.checkpoint_policies
        keep = policies.save_only_these_names(_ATTENTION_OUTPUT) if remat == "attention" else None
        # In a scan there is nothing that could merge the second computation with the first.
        step = jax.checkpoint(step, policy=keep, prevent_cse=False)
    return jax.lax.scan(step, x, (params, inputs))[0]


def named_output(x: Array) -> Array:
    """Marks an attention's output as what remat "attention" keeps."""
    return checkpoint_name(x, _ATTENTION_OUTPUT)
