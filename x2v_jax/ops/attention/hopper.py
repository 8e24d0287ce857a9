"""Attention on Hopper GPUs (compute capability 9): what the kernel takes, and how its inputs are made."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from x2v_jax.ops.attention.hopper_config import EIGHT_BIT_VALUES, HEAD_DIM, HopperConfig, Precision, config_for
from x2v_jax.ops.attention.quantized import quantize, transposed_values
from x2v_jax.ops.attention.tiles import Span, tiles_of_length, tiles_of_spans
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

# The kernel's copies address rows in eights. What lies behind the last is read as zeros and not written.
_ROWS_UNIT = 8
# Fewer rows than a tile has are filled up to one.
_LEAST_ROWS = 128


def takes_hopper(q: Array, k: Array, v: Array) -> bool:
    """Whether the kernel takes these inputs: 128 channels, 16 bits, everywhere the same type."""
    same = q.dtype == k.dtype == v.dtype
    return same and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] == k.shape[-1] == v.shape[-1] == HEAD_DIM


def takes_groups(q: Array, k: Array) -> bool:
    """Whether `attention_hopper_groups` reads such rows without a copy."""
    return takes_hopper(q, k, k) and k.shape[1] % _ROWS_UNIT == 0 and k.shape[1] >= _LEAST_ROWS


def attention_hopper(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    precision: Precision = "full",
    key_length: Int[Array, ""] | None = None,
    with_log_sum_exp: bool = False,
    config: HopperConfig | None = None,
    rows: QuantizedRows | None = None,
) -> tuple[Float[Array, "b lq h d"], Float[Array, "b h lq"] | None]:
    """(softmax(q k^T * scale) v, log-sum-exp of scores if asked). No gradient: see `api.py`.

    Needs `takes_hopper`, and a program that is lowered for a Hopper GPU.

    Args:
        key_length: only the first so many keys count, at least 1; may be traced. The rows behind must be finite.
        config: None: the committed one for the precision and shape.
        rows: with 8 bits, see `quantized.quantize`.
    """
    config = config or config_for(precision, q.shape[1], k.shape[1])
    tiles = tiles_of_length(k.shape[1] if key_length is None else key_length, config.block_kv)
    return _run(
        q, k, v, tiles, config,
        scale=scale, precision=precision, key_length=key_length, with_log_sum_exp=with_log_sum_exp, rows=rows,
    )  # fmt: skip


def attention_hopper_spans(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    spans: Sequence[Span],
    *,
    scale: float,
    precision: Precision = "full",
    config: HopperConfig | None = None,
) -> Float[Array, "b lq h d"]:
    """Each span of queries over its own keys, all in one kernel. The spans cover all queries in order."""
    config = config or config_for(precision, q.shape[1], k.shape[1])
    # A thread block has queries of one span: each span is filled up to whole blocks.
    filled = jnp.concatenate([_fill(q[:, span.start : span.stop], config.rows) for span in spans], axis=1)
    tiles = jnp.asarray(tiles_of_spans(spans, config.rows, config.block_kv))
    out, _ = _run(filled, k, v, tiles, config, scale=scale, precision=precision)
    parts, start = [], 0
    for span in spans:
        length = span.stop - span.start
        parts.append(out[:, start : start + length])
        start += math.ceil(length / config.rows) * config.rows
    return jnp.concatenate(parts, axis=1)


def attention_hopper_groups(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "g lk h d"],
    v: Float[Array, "g lk h d"],
    *,
    first_group: Int[Array, ""],
    key_length: Int[Array, ""],
    scale: float,
    config: HopperConfig | None = None,
) -> Float[Array, "b lq h d"]:
    """Batch item b attends to the first rows of group first_group + b, read from where they lie: no copy is made.

    A cache of all layers is such an array, with layers and batch as one axis. Both numbers may be traced. Needs
    `takes_groups`.
    """
    from x2v_jax.ops.attention.hopper_kernel import KernelInputs, hopper_attention_kernel

    config = config or config_for("full", q.shape[1], k.shape[1])
    group = jnp.asarray(first_group, jnp.int32)[None]
    inputs = KernelInputs(_fill(q, _ROWS_UNIT), k, v, tiles_of_length(key_length, config.block_kv), group)
    out, _ = hopper_attention_kernel(inputs, factor=_factor(scale), config=config, out_dtype=q.dtype)
    return out[:, : q.shape[1]]


def _run(
    q: Array,
    k: Array,
    v: Array,
    tiles: Array,
    config: HopperConfig,
    *,
    scale: float,
    precision: Precision,
    key_length: Array | None = None,
    with_log_sum_exp: bool = False,
    rows: QuantizedRows | None = None,
) -> tuple[Array, Array | None]:
    # Imported here: it takes a second, and most programs have no such kernel.
    from x2v_jax.ops.attention.hopper_kernel import KernelInputs, hopper_attention_kernel

    length, dtype = q.shape[1], q.dtype
    first_group, mean_score, scales = jnp.zeros(1, jnp.int32), 0.0, {}
    if precision != "full":
        parts = quantize(q, k, v, scale=scale, precision=precision, key_length=key_length, rows=rows)
        q, k, v, mean_score = parts.q, parts.k, parts.v, parts.mean_score
        blocks = math.ceil(length / config.rows) * config.rows
        q_scale = jnp.pad(parts.q_scale, ((0, 0), (0, 0), (0, blocks - length)), constant_values=1)
        scales = {"q_scale": q_scale, "k_scale": parts.k_scale, "v_scale": parts.v_scale}
    if precision in EIGHT_BIT_VALUES:
        v = transposed_values(v, in_key_order=config.probabilities == "registers")
    else:
        v = _fill(v, _ROWS_UNIT, _LEAST_ROWS)
    inputs = KernelInputs(
        _fill(q, _ROWS_UNIT), _fill(k, _ROWS_UNIT, _LEAST_ROWS), v, tiles, first_group, **scales
    )  # fmt: skip
    out, log_sum_exp = hopper_attention_kernel(
        inputs, factor=_factor(scale), config=config, out_dtype=dtype, with_log_sum_exp=with_log_sum_exp
    )
    return out[:, :length], None if log_sum_exp is None else log_sum_exp[:, :, :length] + mean_score


def _factor(scale: float) -> float:
    return scale * math.log2(math.e)


def _fill(x: Array, unit: int, least: int = 0) -> Array:
    """Rows of zeros at the end, up to a multiple of `unit` and at least `least` of all."""
    missing = max(math.ceil(x.shape[1] / unit) * unit, least) - x.shape[1]
    return x if missing == 0 else jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
