"""Tiles of the W8A8 matmul that a measurement chose: (N, K, dtype, kind) -> fields of MatmulConfig.

Data, written by `python -m benchmarks.gpu kernels --autotune`.
"""

from typing import Any

ROWS: dict[tuple[int, int, str, str], dict[str, Any]] = {}
