"""Which shapes the Hopper kernel takes, and with which tiles."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from x2v_jax.ops.linear_8bit.tuned import ROWS

# H100 SXM and H200; used where a program is compiled for a GPU that is not there.
_HOPPER_CORES = 132
_MIN_ROWS = 128


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Tiles of the persistent matmul. A block has two warpgroups that multiply and one that loads.

    Attributes:
        tile_n: output channels a block; its 128 rows are 64 a warpgroup.
        tile_k: of the contracted axis a pipeline stage; 128 is one swizzle atom of bytes.
        stages: pipeline stages in shared memory.
        epilogue_n: columns that leave (and with a residual enter) through shared memory at a time.
        epilogue_slots: buffers of that width a warpgroup; with a residual all but one hold tiles on their way in.
        cluster: blocks that work on the same columns and load the weight's tile together, each a part for all.
        snake: how many column tiles neighbouring blocks share rows over, for the L2 cache.
        promote: float8 only: after so many stages partial sums move to float32 registers, because Hopper's float8
            accumulator keeps about 14 bits. 0: never, as in vLLM's kernels; needs tile_n <= 128 otherwise.
        measured: whether a measurement on a GPU chose this row of the table.
    """

    tile_n: int = 256
    tile_k: int = 128
    stages: int = 4
    epilogue_n: int = 32
    epilogue_slots: int = 2
    cluster: int = 2
    snake: int = 8
    promote: int = 0
    measured: bool = False


_PLAIN = MatmulConfig()
# float32 in and out of shared memory: narrower columns, more of them on their way.
_RESIDUAL = MatmulConfig(epilogue_n=16, epilogue_slots=3)
_RESIDUAL_TOKEN_GATE = MatmulConfig(stages=3, epilogue_n=16, epilogue_slots=4)
_FLOAT32 = MatmulConfig(epilogue_n=16)

# (N, K) of every 8-bit matrix of the 1.3B and 14B transformers, the text encoder and the image encoder.
WAN_MATRICES = (
    (1536, 1536),
    (8960, 1536),
    (1536, 8960),
    (5120, 5120),
    (13824, 5120),
    (5120, 13824),
    (4096, 4096),
    (10240, 4096),
    (4096, 10240),
    (3840, 1280),
    (1280, 1280),
    (5120, 1280),
    (1280, 5120),
)

# One row a matrix, dtype and kind of epilogue ("plain" writes 16 bits, "float32" 32, "residual" adds to a residual,
# "token_gate" with a gate of its own for each token). Rows of a tuning run replace these defaults.
TABLE: dict[tuple[int, int, str, str], MatmulConfig] = {
    (n, k, dtype, kind): config
    for n, k in WAN_MATRICES
    for dtype in ("int8", "float8_e4m3fn")
    for kind, config in (
        ("plain", _PLAIN),
        ("float32", _FLOAT32),
        ("residual", _RESIDUAL),
        ("token_gate", _RESIDUAL_TOKEN_GATE),
    )
} | {key: dataclasses.replace(MatmulConfig(**row), measured=True) for key, row in ROWS.items()}


def config_for(n: int, k: int, dtype: DTypeLike, kind: str) -> MatmulConfig | None:
    """The tiles for a weight [n, k] in an 8-bit dtype; None where the kernel does not take the shape."""
    return TABLE.get((n, k, jnp.dtype(dtype).name, kind))


def takes(m: int, n: int, k: int) -> bool:
    """Whether the kernel takes x [m, k] and a weight [n, k].

    With fewer rows the weight's bytes are what takes time, and XLA is as good.
    """
    return m >= _MIN_ROWS and (n, k) in WAN_MATRICES


def core_count() -> int:
    """Streaming multiprocessors of the GPU, one persistent block each."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else _HOPPER_CORES
