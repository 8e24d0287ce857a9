"""Memory of the device as it is: what there is, what is free, the most that was held."""

import sys
from typing import cast


def peak_bytes() -> int:
    """The most memory held so far: on a GPU by jax on the first device, on a CPU by this process."""
    statistics = _device_statistics()
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def device_bytes_free() -> int | None:
    """Bytes that the first device could still give; None where that is not known, as on CPU."""
    statistics = _device_statistics()
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)


def device_bytes() -> int | None:
    """Bytes that jax may take of the first device; None where that is not known, as on CPU."""
    return _device_statistics().get("bytes_limit")


def _device_statistics() -> dict[str, int]:
    import jax

    # jaxlib, where devices come from, has no types.
    found = jax.local_devices()[0].memory_stats()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    statistics = cast(dict[str, int] | None, found)
    return statistics or {}
