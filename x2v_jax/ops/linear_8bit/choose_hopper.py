"""Whether programs here may have the Hopper matmul, and with which tiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from x2v_jax.ops.linear_8bit.choose import proved
from x2v_jax.ops.linear_8bit.config import MatmulConfig, config_for, takes
from x2v_jax.ops.linear_8bit.hopper import matmul_hopper
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows, quantize_rows_reference, quantize_weight
from x2v_jax.ops.linear_8bit.reference import Activation, matmul_8bit

# Of the kernel to the same computation in jnp: bfloat16 rounds by 0.002, Hopper's float8 accumulator by less.
ALLOWED_ERROR = 0.01


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What makes two kernels different programs, besides sizes."""

    dtype: str
    out_dtype: str
    activation: Activation
    has_bias: bool
    # "channel", "token" or None.
    gate: str | None
    has_residual: bool
    config: MatmulConfig

    def __str__(self) -> str:
        c, gate = self.config, self.gate and f"gate a {self.gate}"
        parts = [self.activation, "bias" if self.has_bias else None, gate, "residual" if self.has_residual else None]
        after = "".join(f", {part}" for part in parts if part)
        tiles = f"{c.tile_n}x{c.tile_k}, {c.stages} stages, {c.epilogue_slots}x{c.epilogue_n} out, snake {c.snake}"
        return f"{self.dtype} to {self.out_dtype}{after}; {tiles}, promote {c.promote}, clusters of {c.cluster}"


def matmul_config(
    x: QuantizedRows,
    weight: Array,
    bias: Array | None,
    activation: Activation,
    gate: Array | None,
    residual: Array | None,
    out_dtype: DTypeLike,
) -> MatmulConfig | None:
    """The tiles; None where the kernel does not take the arguments, or failed its self-check on this device."""
    out = jnp.dtype(out_dtype)
    n, k = weight.shape
    if not takes(x.values.shape[0], n, k) or out not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return None
    gates = None if gate is None else "token" if gate.shape[0] > 1 else "channel"
    if residual is None:
        if gate is not None:
            return None
        kind = "float32" if out == jnp.float32 else "plain"
    elif residual.dtype == out == jnp.float32:
        kind = "token_gate" if gates == "token" else "residual"
    else:
        return None
    config = config_for(n, k, weight.dtype, kind)
    if config is None:
        return None
    dtype, alone = jnp.dtype(weight.dtype).name, dataclasses.replace(config, cluster=1)
    for tiles, instead in ((config, "one block a cluster"), (alone, "XLA"))[config == alone :]:
        kernel = _Kernel(dtype, out.name, activation, bias is not None, gates, residual is not None, tiles)
        if _proved(kernel, instead):
            return tiles
    return None


def _proved(kernel: _Kernel, instead: str) -> bool:
    """Compared on rows that end within a block's tile, and before its peer's, over every stage of the ring, twice."""
    config = kernel.config
    m, n, k = 328, 2 * config.tile_n, config.tile_k * (2 * config.stages + 1)

    def arguments() -> list[Any]:
        keys = jax.random.split(jax.random.key(0), 5)
        x = quantize_rows_reference(jax.random.normal(keys[0], (m, k)), kernel.dtype)
        weight, scale = quantize_weight(jax.random.normal(keys[1], (n, k)), kernel.dtype)
        bias = jax.random.normal(keys[2], (n,)) if kernel.has_bias else None
        gate = jax.random.normal(keys[3], (m if kernel.gate == "token" else 1, n)) if kernel.gate else None
        residual = jax.random.normal(keys[4], (m, n)) if kernel.has_residual else None
        return [x, weight, scale, bias, kernel.activation, gate, residual, kernel.out_dtype]

    return proved(
        "8-bit linear layer",
        str(kernel),
        lambda: matmul_hopper(*arguments(), config=config, num_clusters=3),
        lambda: matmul_8bit(*arguments()),
        ALLOWED_ERROR,
        instead,
    )
