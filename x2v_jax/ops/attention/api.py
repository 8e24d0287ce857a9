"""The typed entry to attention: picks an implementation by platform, dtype and shape, or takes the one asked for."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from x2v_jax.ops.attention.reference import attention_reference

Implementation = Literal["auto", "reference", "cudnn"]


def attention(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float | None = None,
    key_length: Int[Array, ""] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b lq h d"]:
    """softmax(q k^T * scale) v, every query to every key. scale: 1 / sqrt(d) if None.

    Args:
        key_length: only the first so many keys count, at least 1; may be traced, so that one program serves a cache
            however full it is. The rows behind it must be finite. None: all keys.
        implementation: "reference" (exact, any platform), "cudnn" (16-bit on NVIDIA GPUs, d a multiple of 8 up to 128),
            or "auto": cudnn where the program is lowered for CUDA and the inputs allow it, reference elsewhere.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    reference = functools.partial(attention_reference, scale=factor, key_length=key_length)
    cudnn = functools.partial(attention_cudnn, scale=factor, key_length=key_length)
    if implementation == "cudnn":
        return cudnn(q, k, v)
    if implementation == "auto" and takes_cudnn(q):
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=reference)
    return reference(q, k, v)


def attention_cudnn(
    q: Float[Array, "b lq h d"],
    k: Float[Array, "b lk h d"],
    v: Float[Array, "b lk h d"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
) -> Float[Array, "b lq h d"]:
    lengths = None if key_length is None else jnp.full(k.shape[:1], key_length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn")


def takes_cudnn(q: Array) -> bool:
    """Whether a program with these queries may be lowered for CUDA here, and cuDNN takes them there."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and _cuda_present()


@functools.cache
def _cuda_present() -> bool:
    # Where there is no cuDNN, the cudnn branch does not even trace.
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
