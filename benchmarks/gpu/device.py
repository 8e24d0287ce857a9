"""What a report says about the machine, the software and the moment."""

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks import ROOT

_PACKAGES = ("x2v-jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "flax", "numpy")
_QUERIES = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu", "memory.total", "clocks_event_reasons.active",
)  # fmt: skip


def about(command: str) -> dict[str, Any]:
    """Device, clocks, versions, date and commit."""
    import jax

    device = jax.devices()[0]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "nvidia_smi": nvidia_smi(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def nvidia_smi() -> dict[str, str] | None:
    """Clocks and what limits them, as nvidia-smi says; None where there is none."""
    said = _output(["nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader", "--id=0"])
    if said is None:
        return None
    return dict(zip(_QUERIES, (part.strip() for part in said.splitlines()[0].split(",")), strict=False))


def commit() -> str | None:
    """The commit of this checkout, with "+" behind it where files differ from it; None outside of a checkout."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if head is None:
        return None
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return head.strip() + ("+" if changes else "")


def peak_bytes() -> int | None:
    """The most that the device's allocator has held in this process; None where the device does not say."""
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.stdout.strip() else None
