"""What GPU this process has, if any, and what it runs of what was asked for: the rest is refused, or replaced."""

import dataclasses
import functools
import warnings
from collections.abc import Collection
from typing import Any

import jax

from x2v_jax.errors import UserError
from x2v_jax.ops.choice import OpChoice

# Compute capability from which on a GPU multiplies float8.
_FLOAT8 = (8, 9)


@functools.cache
def cuda_device() -> Any:
    """The `jax.Device` that programs run on by default, where it is an NVIDIA GPU; None elsewhere."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    return device if "cuda" in device.client.platform_version.lower() else None


def compute_capability(device: Any) -> tuple[int, int]:
    """(major, minor), such as (9, 0) of an H200."""
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)


def named(device: Any) -> str:
    """For messages: its kind and compute capability."""
    return f"{device.device_kind} has {'.'.join(map(str, compute_capability(device)))}"


def is_hopper(device: object) -> bool:
    """Whether it has the instructions of sm_90a, which later generations dropped."""
    return compute_capability(device)[0] == 9


@dataclasses.dataclass(frozen=True)
class Device:
    """kind: as jax names it. capability: of a CUDA GPU, such as (9, 0); None elsewhere."""

    kind: str
    capability: tuple[int, int] | None = None


def first_device() -> Device:
    cuda = cuda_device()
    return Device(jax.local_devices()[0].device_kind, None if cuda is None else compute_capability(cuda))


def supported(ops: OpChoice, quantizations: Collection[str], device: Device) -> OpChoice:
    """The choice that runs on a device: what is asked for by name must be there, and a slow way is warned of.

    Args:
        quantizations: 8-bit types of the checkpoint's weights.

    Raises:
        UserError: an implementation was asked for by name and the device cannot run it.
    """
    where = f"this device is {device.kind}"
    if device.capability is not None:
        where += f" of compute capability {device.capability[0]}.{device.capability[1]}"
    is_hopper = device.capability is not None and device.capability[0] == 9
    for name in ("attention", "linear"):
        if getattr(ops, name) == "hopper" and not is_hopper:
            raise UserError(
                f"{name} is 'hopper', whose kernels need a GPU of compute capability 9.0, and {where}; set {name} to "
                "'auto'"
            )
    if ops.attention == "cudnn" and device.capability is None:
        raise UserError(f"attention is 'cudnn', which needs an NVIDIA GPU, and {where}; set attention to 'auto'")
    if ops.attention_precision != "full" and not is_hopper and ops.attention != "reference":
        only_on_hopper = (
            f"attention_precision is {ops.attention_precision!r}, which only Hopper GPUs compute, and {where}"
        )
        if device.capability is None:
            warnings.warn(f"{only_on_hopper}: it is imitated here, more slowly than 'full'", stacklevel=3)
        else:
            warnings.warn(
                f"{only_on_hopper}: 'full' is used, which is faster here; to imitate it, set attention to 'reference'",
                stacklevel=3,
            )
            ops = dataclasses.replace(ops, attention_precision="full")
    if ops.linear_activations == "16bit" and not quantizations:
        warnings.warn(
            "linear_activations is '16bit', which is for checkpoints with 8-bit weights; this one has none, so nothing "
            "changes",
            stacklevel=3,
        )
    lacks_float8 = device.capability is not None and device.capability < _FLOAT8
    if "float8_e4m3fn" in quantizations and ops.linear_activations == "8bit" and lacks_float8:
        warnings.warn(
            f"the checkpoint's weights are float8_e4m3fn, which {where} cannot multiply: they are dequantized to 16 "
            "bits (linear_activations '16bit'); int8 weights would be faster here",
            stacklevel=3,
        )
        return dataclasses.replace(ops, linear_activations="16bit")
    return ops
