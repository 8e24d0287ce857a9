"""Whether programs here may have the Hopper kernel, and in which configuration."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from x2v_jax.errors import UserError
from x2v_jax.ops.attention.hopper import attention_hopper
from x2v_jax.ops.attention.hopper_config import (
    EIGHT_BIT_VALUES,
    HEAD_DIM,
    HopperConfig,
    Precision,
    Probabilities,
    config_for,
)
from x2v_jax.ops.attention.reference import attention_reference
from x2v_jax.ops.devices import cuda_device, is_hopper, named
from x2v_jax.ops.self_check import FastPath, relative_error, works

# Of the kernel to the same computation in jnp. Right kernels are within 0.003: the rounding of bfloat16 outputs.
ALLOWED_ERROR = 0.01
_FULL = "attention in full precision"


def hopper_config(precision: Precision, queries: int, keys: int) -> HopperConfig | None:
    """The configuration for a shape; None: the kernel failed its self-check on this device.

    In a process that has no NVIDIA GPU, a program for CUDA is for a GPU elsewhere, which is taken to be a Hopper.

    Raises:
        UserError: this process' GPU is no Hopper.
    """
    config = config_for(precision, queries, keys)
    device = cuda_device()
    if device is None:
        return config
    if not is_hopper(device):
        raise UserError(_refusal(precision, device))
    paths: tuple[tuple[Probabilities, str], ...] = ((config.probabilities, _FULL),)
    if precision in EIGHT_BIT_VALUES and config.probabilities == "registers":
        paths = (("registers", "probabilities through shared memory"), ("shared", _FULL))
    for probabilities, instead in paths:
        candidate = dataclasses.replace(config, probabilities=probabilities)
        name = "hopper" if probabilities == config.probabilities else f"hopper ({probabilities})"
        way_out = "attention to 'cudnn'" if precision == "full" else "attention_precision to 'full'"
        path = FastPath("attention", name, precision, instead, way_out)
        if works(path, _comparison(precision, candidate), ALLOWED_ERROR):
            return candidate
    return None


def on_hopper() -> bool:
    """Whether this process' GPU, or the GPU elsewhere that it makes programs for, is a Hopper."""
    device = cuda_device()
    return device is None or is_hopper(device)


def _refusal(precision: Precision, device: object) -> str:
    # The simulation would be right, but slower than cuDNN and less exact: nobody wants that without asking for it.
    have = f"needs a Hopper GPU (compute capability 9.0); {named(device)}"
    if precision == "full":
        return f"attention='hopper' {have}: set attention to 'auto'"
    return f"attention_precision={precision!r} {have}: set it to 'full', or attention to 'reference' to simulate it"


def _comparison(precision: Precision, config: HopperConfig) -> Callable[[], float]:
    """The larger relative error of output and log-sum-exp, over every stage of the pipeline and a tile that is cut."""

    def error() -> float:
        lengths = (200, 904, 904)
        q, k, v = (
            jax.random.normal(jax.random.key(i), (1, length, 2, HEAD_DIM), jnp.bfloat16)
            for i, length in enumerate(lengths)
        )
        scale, length = HEAD_DIM**-0.5, jnp.int32(900)

        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
            ours, log_sum_exp = attention_hopper(
                q, k, v, scale=scale, precision=precision, key_length=length, with_log_sum_exp=True, config=config
            )
            reference = attention_reference(
                q, k, v, scale=scale, precision=precision, key_length=length, with_log_sum_exp=True
            )
            if log_sum_exp is None:
                raise ValueError("no log-sum-exp came")
            return [relative_error(x, y) for x, y in zip((ours, log_sum_exp), reference, strict=True)]

        return max(float(x) for x in jax.jit(both)(q, k, v))

    return error
