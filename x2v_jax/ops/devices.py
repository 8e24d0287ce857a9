"""What GPU this process has, if any."""

import functools
from typing import Any

import jax


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
