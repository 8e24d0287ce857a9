"""The typed entry to attention: picks who computes it by platform, precision and shape, or takes the one asked for."""

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from x2v_jax.errors import UserError
from x2v_jax.ops.attention.choose_hopper import hopper_config, on_hopper
from x2v_jax.ops.attention.hopper import attention_hopper, takes_hopper
from x2v_jax.ops.attention.hopper_config import PRECISIONS, HopperConfig, Precision, faster_than_cudnn
from x2v_jax.ops.attention.quantized import query_dtype
from x2v_jax.ops.attention.reference import attention_reference, with_gradient_of
from x2v_jax.ops.choice import CHOICES, AttentionImplementation
from x2v_jax.ops.devices import cuda_device
from x2v_jax.ops.linear_8bit.quantize import QuantizedRows

Implementation = AttentionImplementation


@overload
def attention(
    q: Array | QuantizedRows, k: Array, v: Array, *, scale: float | None = None, key_length: Array | None = None,
    implementation: Implementation = "auto", precision: Precision = "full", with_log_sum_exp: Literal[False] = False,
) -> Array: ...  # fmt: skip


@overload
def attention(
    q: Array | QuantizedRows, k: Array, v: Array, *, scale: float | None = None, key_length: Array | None = None,
    implementation: Implementation = "auto", precision: Precision = "full", with_log_sum_exp: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip


def attention(
    q: Float[Array, "b lq h d"] | QuantizedRows,
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float | None = None,
    key_length: Int[Array, ""] | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "full",
    with_log_sum_exp: bool = False,
) -> Any:
    """softmax(q k^T * scale) v, every query to every key. scale: 1 / sqrt(d) if None.

    Args:
        q: with 8 bits also queries that are rounded already, as `rmsnorm_rope` gives them: to `query_dtype(precision)`,
            each head of each token with a scale of its own. Their `source` is what is used where no 8-bit product is.
        key_length: only the first so many keys count, at least 1; may be traced, so that one program serves a cache
            however full it is. The rows behind it must be finite. None: all keys.
        implementation: "reference" (any platform), "cudnn" (16-bit on NVIDIA GPUs, d a multiple of 8 up to 128),
            "hopper" (our kernel: 16-bit, d = 128, on GPUs of compute capability 9; other shapes and platforms get the
            reference), or "auto": the fastest where the program is lowered for CUDA and the inputs allow it, the
            reference elsewhere. In full precision that is cuDNN, unless a measurement in `hopper_table` says otherwise.
        precision: "full": the inputs'. "int8", "e4m3": queries times keys in 8 bits; "int8_e4m3", "e4m3_all": and
            probabilities times values in e4m3. Where no kernel takes the inputs, the same rounding is simulated. The
            gradient is, always, that of full precision.
        with_log_sum_exp: also gives the natural logarithm of the sum of the scores' exponentials, float32 [B, H, Lq]:
            what attentions to parts of the keys are put together with.

    Raises:
        UserError: an unknown name, or one that cannot do what is asked, or a GPU that cannot.
    """
    _check(implementation, precision, with_log_sum_exp)
    rows = None
    if isinstance(q, QuantizedRows):
        rows, q = _rows_and_floats(q, precision, k.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    fixed: dict[str, Any] = {"scale": factor, "with_log_sum_exp": with_log_sum_exp}
    if precision == "full":
        return _full(q, k, v, key_length, implementation, fixed)

    def reference(q: Array, k: Array, v: Array, rows: QuantizedRows | None) -> Any:
        return attention_reference(q, k, v, precision=precision, key_length=key_length, rows=rows, **fixed)

    if implementation == "reference" or not takes_hopper(q, k, v):
        return reference(q, k, v, rows)
    config = hopper_config(precision, q.shape[1], k.shape[1])
    if config is None:
        return _full(q, k, v, key_length, "auto", fixed)
    kernel = _hopper(config, precision, fixed, key_length)
    return jax.lax.platform_dependent(q, k, v, rows, cuda=kernel, default=reference)


def _rows_and_floats(q: QuantizedRows, precision: Precision, dtype: Any) -> tuple[QuantizedRows, Array]:
    """(queries in 8 bits, the same in floats). Programs that need no floats do not compute them."""
    if precision == "full" or q.values.dtype != query_dtype(precision):
        raise UserError(f"q is {q.values.dtype} rows, and attention_precision is {precision!r}: give floats")
    if q.source is None:
        raise ValueError("these quantized queries were made without a source")
    return q._replace(source=None), q.source.astype(dtype)


def _hopper(config: HopperConfig, precision: Precision, fixed: dict[str, Any], key_length: Array | None) -> Any:
    """(q, k, v, rows) -> what `attention` gives, by the kernel; the backward pass is the fastest exact one."""

    def forward(q: Array, k: Array, v: Array, key_length: Array | None, rows: QuantizedRows | None) -> Any:
        both = attention_hopper(q, k, v, precision=precision, key_length=key_length, config=config, rows=rows, **fixed)
        return both if fixed["with_log_sum_exp"] else both[0]

    def exact(q: Array, k: Array, v: Array, key_length: Array | None) -> Any:
        log_sum_exp = fixed["with_log_sum_exp"]
        attend = attention_cudnn if takes_cudnn(q) and not log_sum_exp else attention_reference
        arguments = fixed if log_sum_exp else {"scale": fixed["scale"]}
        return attend(q, k, v, key_length=key_length, **arguments)

    attend = with_gradient_of(exact, forward)
    return lambda q, k, v, rows=None: attend(q, k, v, key_length, rows)


def attention_cudnn(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
) -> Float[Array, "b lq h d"]:
    """cuDNN's: 16 bits, any lengths, with its own backward pass. Only where the program is lowered for CUDA."""
    lengths = None if key_length is None else jnp.full(k.shape[:1], key_length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn")


def takes_cudnn(q: Array) -> bool:
    """Whether a program with these queries may be lowered for CUDA here, and cuDNN takes them there."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and cuda_device() is not None


def _full(
    q: Array, k: Array, v: Array, key_length: Array | None, implementation: Implementation, fixed: dict[str, Any]
) -> Any:
    reference = functools.partial(attention_reference, key_length=key_length, **fixed)
    if implementation == "reference":
        return reference(q, k, v)
    cudnn = functools.partial(attention_cudnn, scale=fixed["scale"], key_length=key_length)
    if implementation == "cudnn":
        return cudnn(q, k, v)
    if takes_hopper(q, k, v) and (implementation == "hopper" or _prefers_hopper(q, k, fixed["with_log_sum_exp"])):
        config = hopper_config("full", q.shape[1], k.shape[1])
        if config is not None:
            kernel = _hopper(config, "full", fixed, key_length)
            return jax.lax.platform_dependent(q, k, v, cuda=kernel, default=reference)
    if takes_cudnn(q) and not fixed["with_log_sum_exp"]:
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=reference)
    return reference(q, k, v)


def _prefers_hopper(q: Array, k: Array, with_log_sum_exp: bool) -> bool:
    """For "auto": where there is a Hopper now, and cuDNN is slower or, rounding the log-sum-exp to 16 bits, not fit."""
    if cuda_device() is None or not on_hopper():
        return False
    return with_log_sum_exp or faster_than_cudnn(q.shape[1], k.shape[1])


def _check(implementation: str, precision: str, with_log_sum_exp: bool) -> None:
    for name, value, known in (
        ("attention", implementation, CHOICES["attention"]), ("attention_precision", precision, PRECISIONS),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if implementation == "cudnn" and precision != "full":
        raise UserError(
            f"attention='cudnn' has no attention_precision={precision!r}; set attention to 'auto', or the precision to "
            "'full'"
        )
    if implementation == "cudnn" and with_log_sum_exp:
        raise UserError("attention='cudnn' rounds the log-sum-exp to 16 bits; set attention to 'auto'")
