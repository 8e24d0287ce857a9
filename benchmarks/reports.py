"""What reports say about how they were made, and the parts of documents that programs write from them."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks import ROOT
from x2v_jax.shipped import VERSION

_PACKAGES = ("x2v-jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "flax", "numpy")
_QUERIES = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu", "memory.total", "clocks_event_reasons.active",
)  # fmt: skip


def circumstances(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Command, date, device and versions."""
    import jax
    import numpy as np

    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "x2v-jax": VERSION,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def circumstances_on_gpu(command: str) -> dict[str, Any]:
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


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.stdout.strip() else None


class NoSuchPart(ValueError):
    """The document has no such comments around a part that a program writes."""


def replace_part(document: str, name: str, content: str) -> str:
    """The document with what stands between <!-- begin NAME … --> and <!-- end NAME --> replaced.

    Raises:
        NoSuchPart: they are not there, in this order.
    """
    start, end = _bounds(document, name)
    return f"{document[:start]}\n{content.strip()}\n{document[end:]}"


def part(document: str, name: str) -> str:
    """What stands between the two comments.

    Raises:
        NoSuchPart: they are not there, in this order.
    """
    start, end = _bounds(document, name)
    return document[start:end].strip()


def _bounds(document: str, name: str) -> tuple[int, int]:
    opening = document.find(f"<!-- begin {name}")
    start = document.find("-->", opening) + 3
    end = document.find(f"<!-- end {name} -->", start)
    if opening < 0 or start < 3 or end < 0:
        raise NoSuchPart(f"no part {name!r}: put <!-- begin {name} --> and <!-- end {name} --> into the document")
    return start, end
