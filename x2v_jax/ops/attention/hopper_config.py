"""How the Hopper kernel is cut up: tile sizes, pipeline depth and who works, looked up by precision and shape."""

import dataclasses
from typing import Literal, get_args

from x2v_jax.ops.attention.hopper_table import ENTRIES
from x2v_jax.ops.choice import AttentionPrecision

Precision = AttentionPrecision
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Those whose probabilities and values are e4m3 too.
EIGHT_BIT_VALUES: tuple[Precision, ...] = ("int8_e4m3", "e4m3_all")
# Where 8-bit probabilities go to be multiplied with values.
Probabilities = Literal["registers", "shared"]
ROWS = 64  # queries of one warpgroup: what a wgmma takes
HEAD_DIM = 128
SCALE_BLOCK = 128  # keys that share a scale
# What one thread block may have on a Hopper GPU.
_SHARED_MEMORY = 232_448


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Attributes:

    block_kv: keys a tile.
    stages: tiles of keys, and of values, in flight.
    warpgroups: that compute, with 64 queries each; one more loads.
    ping_pong: two warpgroups take turns, so that one's softmax runs beside the other's products.
    probabilities: 8-bit ones are used from the registers that they are in, or go through shared memory. The first is
        faster; what the second does, an interpreter can follow.
    """

    block_kv: int = 128
    stages: int = 2
    warpgroups: int = 2
    ping_pong: bool = True
    probabilities: Probabilities = "registers"

    def __post_init__(self) -> None:
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; a scale is for 128 keys, so give 64 or 128")
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups is {self.warpgroups}; the registers are enough for 1, 2 or 3")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; give at least 2")

    @property
    def rows(self) -> int:
        """Queries of one thread block."""
        return self.warpgroups * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that loads; together at most 65,536 a thread block."""
        return (160, 24) if self.warpgroups == 3 else (232, 40)

    @property
    def takes_turns(self) -> bool:
        return self.ping_pong and self.warpgroups == 2

    def shared_memory(self, precision: Precision) -> int:
        """Bytes of the tiles in shared memory; vectors and barriers are some hundred more."""
        q_bytes, v_bytes = 2 if precision == "full" else 1, 1 if precision in EIGHT_BIT_VALUES else 2
        through = self.rows * self.block_kv if self._stores_probabilities(precision) else 0
        return (
            self.rows * HEAD_DIM * (q_bytes + 2)
            + self.stages * self.block_kv * HEAD_DIM * (q_bytes + v_bytes)
            + through
        )

    def fits(self, precision: Precision) -> bool:
        return self.shared_memory(precision) <= _SHARED_MEMORY - 3 * 1024

    def _stores_probabilities(self, precision: Precision) -> bool:
        return precision in EIGHT_BIT_VALUES and self.probabilities == "shared"


def shape_class(queries: int, keys: int) -> str:
    """What a shape is looked up as: "cross" (few keys), "chunk" (few queries to many keys) or "long"."""
    if keys < 2048:
        return "cross"
    return "chunk" if queries < 8192 else "long"


def config_for(precision: Precision, queries: int, keys: int) -> HopperConfig:
    """The committed configuration for a shape: a measured one where there is one, else the default."""
    return HopperConfig(**ENTRIES[f"{precision}/{shape_class(queries, keys)}"]["config"])


def faster_than_cudnn(queries: int, keys: int) -> bool:
    """Whether a measurement says that the kernel beats cuDNN in full precision. Unmeasured is no."""
    entry = ENTRIES[f"full/{shape_class(queries, keys)}"]
    return bool(entry["measured"] and entry["faster_than_cudnn"])
