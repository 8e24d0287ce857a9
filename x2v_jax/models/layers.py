"""Layers that the networks share. Norms and their statistics are float32; matmuls run in the module's `dtype`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.lax import broadcast_to_rank
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from x2v_jax.models.host_blocks import lie_on_host, scan_from_host
from x2v_jax.ops.choice import DEFAULT_OPS, OpChoice
from x2v_jax.ops.fused_norms import layernorm_modulate, layernorm_modulate_quantize, normalize, rms_normalize
from x2v_jax.ops.linear_8bit import QuantizedRows, linear_8bit, quantize_rows

# What the matmuls of the blocks store their weights as; None: floats.
Quantization = Literal["int8", "float8_e4m3fn"] | None


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
        y = y if self.bias is None else y + broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)
        return y.reshape(*x.shape[:-1], -1)

    def prepare(self, x: Float[Array, "*b i"], plus: Float[Array, "*b i"] | None = None) -> Float[Array, "*b i"]:
        """The input x, or x + plus, with what several layers that read it can share of their work: nothing here."""
        return x if plus is None else x + plus

    def modulate(self, x: Float[Array, "*b i"], shift: Array, scale: Array, eps: float) -> Float[Array, "*b i"]:
        """The input of this layer and those beside it: x normalised, times 1 + scale, plus shift."""
        return layernorm_modulate(x, shift, scale, eps)

    def normalize(self, x: Float[Array, "*b i"], norm: "LayerNorm") -> Float[Array, "*b i"]:
        """The input of this layer where a norm with parameters precedes it."""
        return norm(x)

    def gelu(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """GELU of the result, in its tanh form."""
        return jax.nn.gelu(self(x))

    def add_to(
        self, residual: Float[Array, "*b o"], x: Float[Array, "*b i"], gate: Float[Array, "..."] | None = None
    ) -> Float[Array, "*b o"]:
        """residual + gate * the result, summed in float32."""
        y = self(x).astype(jnp.float32)
        return residual + (y if gate is None else y * gate)


class QuantizedLinear(nnx.Module):
    """y = x @ (weight * scale).T + bias. weight: [out_features, in_features] in 8 bits, scale: [out_features] float32.

    Made to be filled from a checkpoint: a new one computes zeros. What follows the product (bias, GELU, gate and
    residual) is handed to the operation, which does it before the result leaves the registers.

    Args:
        quantization: of the weights.
        ops: whose `linear` and `linear_activations` count.
        dtype: of the result, and with 16-bit activations of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        quantization: Quantization,
        ops: OpChoice,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), quantization))
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.dtype = dtype
        self.ops = ops

    def __call__(self, x: Float[Array, "*b i"] | QuantizedRows) -> Float[Array, "*b o"]:
        return self._compute(x, out_dtype=self.dtype)

    def prepare(
        self, x: Float[Array, "*b i"], plus: Float[Array, "*b i"] | None = None
    ) -> Float[Array, "*b i"] | QuantizedRows:
        """x, or x + plus, rounded to 8 bits row by row, once for all layers that read it."""
        if self.takes_rows:
            return quantize_rows(x, self.weight.dtype, plus=plus, implementation=self.ops.linear)
        return x if plus is None else x + plus

    def modulate(
        self, x: Float[Array, "*b i"], shift: Array, scale: Array, eps: float
    ) -> Float[Array, "*b i"] | QuantizedRows:
        """As `Linear.modulate` and `prepare`: normalised, modulated and rounded to 8 bits in one go."""
        if self.takes_rows:
            return layernorm_modulate_quantize(x, shift, scale, eps, self.weight.dtype, implementation=self.ops.linear)
        return layernorm_modulate(x, shift, scale, eps)

    def normalize(self, x: Float[Array, "*b i"], norm: "LayerNorm") -> Float[Array, "*b i"] | QuantizedRows:
        """norm(x), rounded to 8 bits in the same go."""
        if self.takes_rows:
            shift, scale = (part[...].astype(jnp.float32)[None, None] for part in (norm.bias, norm.scale))
            return self.modulate(x, shift, scale - 1, norm.eps)
        return norm(x)

    @property
    def takes_rows(self) -> bool:
        """Whether inputs are 8-bit rows."""
        return self.ops.linear_activations == "8bit"

    def gelu(self, x: Float[Array, "*b i"] | QuantizedRows) -> Float[Array, "*b o"]:
        """GELU of the result, in its tanh form."""
        return self._compute(x, activation="gelu_tanh", out_dtype=self.dtype)

    def add_to(
        self,
        residual: Float[Array, "*b o"],
        x: Float[Array, "*b i"] | QuantizedRows,
        gate: Float[Array, "..."] | None = None,
    ) -> Float[Array, "*b o"]:
        """residual + gate * the result, summed in float32."""
        return self._compute(x, gate=gate, residual=residual, out_dtype=jnp.float32)

    def _compute(self, x: Any, **epilogue: Any) -> Array:
        if not self.takes_rows:
            x = x.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return linear_8bit(
            x,
            self.weight[...],
            self.scale[...],
            bias,
            activations=self.ops.linear_activations,
            implementation=self.ops.linear,
            **epilogue,
        )


def linear(
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    quantization: Quantization = None,
    ops: OpChoice = DEFAULT_OPS,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
) -> Any:
    """A `Linear`, or a `QuantizedLinear` where there is a quantization. Both are used alike."""
    types: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
    if quantization is None:
        return Linear(in_features, out_features, rngs=rngs, **types)
    return QuantizedLinear(in_features, out_features, quantization=quantization, ops=ops, **types)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, with scale and bias."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = normalize(x, self.eps)
        scale, bias = (broadcast_to_rank(part[...].astype(jnp.float32), y.ndim) for part in (self.scale, self.bias))
        return y * scale + bias


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_normalize(x, self.scale[...], self.eps)


def stacked(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """`num_layers` blocks as one module whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block))(rngs)


Remat = Literal["none", "attention", "block"]
# What "attention" keeps of a block; see `named_output`.
_ATTENTION_OUTPUT = "attention_output"


def scan_blocks(
    blocks: nnx.Module,
    x: PyTree[Array],
    apply: Callable[..., PyTree[Array]],
    *,
    last: int | None = None,
    inputs: PyTree[Array] = None,
    remat: Remat = "none",
) -> PyTree[Array]:
    """x -> apply(block, x) over the stacked blocks in order (the first `last` of them, if given). x may be a tree.

    Args:
        inputs: arrays with a leading layer axis; if given, apply(block, x, inputs of the layer) is called.
        remat: what a gradient keeps of a block: all of it ("none"), its input and the outputs of its attentions, or its
            input alone ("block"); the rest is computed again.

    Weights in the host's memory are brought to the device block by block; see `host_blocks`.
    """
    graphdef, params = nnx.split(blocks)
    if last is not None:
        params = jax.tree.map(lambda leaf: leaf[:last], params)

    def step(carry: PyTree[Array], layer: tuple[PyTree[Array], PyTree[Array]]) -> tuple[PyTree[Array], None]:
        block = nnx.merge(graphdef, layer[0])
        return (apply(block, carry) if inputs is None else apply(block, carry, layer[1])), None

    if remat != "none":
        policies = jax.checkpoint_policies
        keep = policies.save_only_these_names(_ATTENTION_OUTPUT) if remat == "attention" else None
        # In a scan there is nothing that could merge the second computation with the first.
        step = jax.checkpoint(step, policy=keep, prevent_cse=False)
    if lie_on_host(blocks):
        return scan_from_host(lambda x, layer: step(x, layer)[0], x, params, inputs)
    return jax.lax.scan(step, x, (params, inputs))[0]


def named_output(x: Array) -> Array:
    """Marks an attention's output as what remat "attention" keeps."""
    return checkpoint_name(x, _ATTENTION_OUTPUT)
