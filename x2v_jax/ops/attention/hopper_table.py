"""Configurations of the Hopper kernel by precision and shape class. Data: written by benchmarks, read by hopper_config.

"measured": false marks a default that comes from the arithmetic of the kernel and no run. Of "full", an entry says too
whether it was faster than cuDNN; only then does `attention` choose it there.
"""

from typing import Any

ENTRIES: dict[str, dict[str, Any]] = {
    "full/long": {
        "config": {"block_kv": 128, "stages": 2, "warpgroups": 2},
        "measured": False,
        "faster_than_cudnn": False,
    },
    "full/chunk": {
        "config": {"block_kv": 128, "stages": 2, "warpgroups": 2},
        "measured": False,
        "faster_than_cudnn": False,
    },
    "full/cross": {
        "config": {"block_kv": 128, "stages": 2, "warpgroups": 2},
        "measured": False,
        "faster_than_cudnn": False,
    },
    "int8/long": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "int8/chunk": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "int8/cross": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "e4m3/long": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "e4m3/chunk": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "e4m3/cross": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "int8_e4m3/long": {"config": {"block_kv": 128, "stages": 4, "warpgroups": 2}, "measured": False},
    "int8_e4m3/chunk": {"config": {"block_kv": 128, "stages": 4, "warpgroups": 2}, "measured": False},
    "int8_e4m3/cross": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
    "e4m3_all/long": {"config": {"block_kv": 128, "stages": 4, "warpgroups": 2}, "measured": False},
    "e4m3_all/chunk": {"config": {"block_kv": 128, "stages": 4, "warpgroups": 2}, "measured": False},
    "e4m3_all/cross": {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2}, "measured": False},
}
