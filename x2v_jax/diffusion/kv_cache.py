"""The keys and values of earlier frames: one flat tree of fixed shape, however long the video.

Rows are kept by frame. The sink keeps the first rows for good; all other frames share the rest as a ring, so a new
frame takes the place of the oldest and nothing is ever moved. What is valid is always a prefix of the rows, and
attention does not ask in which order keys come. The frames that remain are those of Self-Forcing's cache
(wan/modules/causal_model.py), which shifts all rows down instead.

Keys are kept turned to their absolute frame. Distances within the window are then right for any frame number; those to
the sink grow with the video. In `relative` mode the sink is turned on, from a copy of what was written, so that it
always lies just before the window: a block never sees a distance beyond the window's length.

Nothing of a layer's size is ever copied: rows are written in place, and attention reads a part of them at a time from
where they lie. So the cache is carried through layers and steps in the memory that it has.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from x2v_jax.diffusion.kv_storage import EightBit, Stored, dtype_of, empty, restore, storage_dtypes, store
from x2v_jax.models.causal import check_whole, check_window
from x2v_jax.models.config import WanConfig
from x2v_jax.models.rope import apply_rope, frame_shift_tables
from x2v_jax.ops.attention import Implementation, Precision, ReadRows, RowsInPlace, attention_in_parts


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Which rows hold which frames.

    Attributes:
        window: frames that a block attends to, the sink and itself included: the size of the cache.
        frame_tokens: rows of one frame.
        sink: so many first frames are never evicted.
        relative: whether the sink follows the window in position.
    """

    window: int
    frame_tokens: int
    sink: int = 0
    relative: bool = False

    def __post_init__(self):
        check_whole("frame_tokens", self.frame_tokens, 1)
        check_whole("sink", self.sink, 0)
        check_window(self.window, self.sink, 1)

    @property
    def rows(self) -> int:
        return self.window * self.frame_tokens

    def slot(self, frame: ArrayLike) -> Int[Array, "..."]:
        """The place, in frames, of a frame's rows."""
        frame = jnp.asarray(frame, jnp.int32)
        in_ring = self.sink + (frame - self.sink) % (self.window - self.sink)
        return jnp.where(frame < self.window, frame, in_ring)

    def valid_rows(self, end_frame: ArrayLike) -> Int[Array, "..."]:
        """How many of the first rows hold frames once all frames before `end_frame` were written."""
        return jnp.minimum(jnp.asarray(end_frame, jnp.int32), self.window) * self.frame_tokens

    def evicted(self, end_frame: ArrayLike) -> Int[Array, "..."]:
        """How many frames have left the cache by then: the distance between sink and window that `relative` closes."""
        return jnp.maximum(jnp.asarray(end_frame, jnp.int32) - self.window, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (turned) and values of every layer. Fits `WanModel.with_cache`.

    k, v: [layers, B, rows, H, D]. One leading axis, so that a layer's rows are at one offset of a flat array. Kept in 8
        bits, each is an `EightBit` of such arrays.
    sink_k: [layers, B, rows of the sink, H, D], the sink's keys as they were written, never in 8 bits: what is turned
        on would be rounded twice. None unless layout.relative.

    No gradient passes from one block to the keys and values of an earlier one: what was written before is constant. To
    a cache of 8 bits none passes at all, not even from the block that is being made: train with another.
    """

    k: Stored
    v: Stored
    sink_k: Float[Array, "n b s h d"] | None
    layout: CacheLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, config: WanConfig, layout: CacheLayout, batch: int = 1, dtype: DTypeLike = jnp.bfloat16) -> Self:
        """A cache of zeros for a network of `config`. To start again, write from frame 0: there is nothing to clear.

        dtype: float32, bfloat16 or float16; or, for half the bytes of the last two, "int8" or "int8_e4m3" (see
            `storage_dtypes`).
        """
        shape = (config.num_layers, batch, layout.rows, config.num_heads, config.head_dim)
        sink = (*shape[:2], layout.sink * layout.frame_tokens, *shape[3:])
        moves = layout.relative and layout.sink > 0
        keys, values = storage_dtypes(dtype)
        originals = keys if jnp.issubdtype(keys, jnp.floating) else jnp.bfloat16
        # Not one array twice: both are donated.
        return cls(empty(shape, keys), empty(shape, values), jnp.zeros(sink, originals) if moves else None, layout)

    def write(
        self,
        layer: ArrayLike,
        keys: Float[Array, "b l h d"],
        values: Float[Array, "b l h d"],
        start_frame: ArrayLike,
    ) -> Self:
        """Stores whole frames from `start_frame` on, over the oldest ones where the cache is full.

        A block of frames may be written again and again: it takes the same rows each time.
        """
        k, v, sink_k = jax.lax.stop_gradient((self.k, self.v, self.sink_k))
        tokens, frames = self.layout.frame_tokens, self._frames_of(keys)
        start_frame = jnp.asarray(start_frame, jnp.int32)
        for i in range(frames):
            frame = start_frame + i
            row = self.layout.slot(frame) * tokens
            new_k, new_v = (x[:, i * tokens : (i + 1) * tokens] for x in (keys, values))
            k, v = _put(k, new_k, layer, row), _put(v, new_v, layer, row)
            if sink_k is not None:
                place = jnp.minimum(frame, self.layout.sink - 1) * tokens
                old = _rows(sink_k, layer, place, tokens)
                new = jnp.where(frame < self.layout.sink, new_k.astype(old.dtype), old)
                sink_k = _put(sink_k, new, layer, place)
        if sink_k is not None:
            shift = frame_shift_tables(self.layout.evicted(start_frame + frames), sink_k.shape[-1])
            # Always from the keys as written: turned in place, rounding would add up over the hours.
            k = _put(k, apply_rope(_rows(sink_k, layer, 0, sink_k.shape[2]), shift), layer, 0)
        return dataclasses.replace(self, k=k, v=v, sink_k=sink_k)

    def attend(
        self,
        layer: ArrayLike,
        q: Float[Array, "b l h d"],
        end_frame: ArrayLike,
        *,
        implementation: Implementation = "auto",
        precision: Precision = "full",
    ) -> Float[Array, "b l h d"]:
        """Attention of a layer's queries, of a block that ends before `end_frame`, to all rows that are there then.

        implementation, precision: see `attention_in_parts`. In 8 bits a layer's rows are copied: the multiplication has
        scales by blocks of keys, and values with their channels in front of their rows, which is not how they are kept.
        """
        length = self.layout.valid_rows(end_frame)
        return attention_in_parts(
            q,
            (self, layer),
            _read_like(q),
            rows=self.layout.rows,
            length=length,
            implementation=implementation,
            precision=precision,
            in_place=_in_place,
        )

    def read(
        self, layer: ArrayLike, end_frame: ArrayLike, dtype: DTypeLike | None = None
    ) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h d"], Int[Array, ""]]:
        """(keys, values, how many of their first rows count) for a block that ends before `end_frame`: a copy.

        dtype: of keys and values; None: as they are kept, float32 where that is 8 bits.
        """
        rows = self.layout.rows
        k, v = (restore(_rows(x, layer, 0, rows), dtype or _floating(x)) for x in (self.k, self.v))
        return k, v, self.layout.valid_rows(end_frame)

    def _frames_of(self, keys: Array) -> int:
        frames, rest = divmod(keys.shape[1], self.layout.frame_tokens)
        most = self.layout.window - self.layout.sink
        if rest or not 0 < frames <= most:
            raise ValueError(
                f"{keys.shape[1]} rows are not 1 to {most} frames of {self.layout.frame_tokens} rows, what "
                f"{self.layout} can take at once"
            )
        return frames


def _read_like(q: Array) -> ReadRows:
    def read(
        source: PyTree[Array | int], first_row: Array | int, rows: int, first_head: Array | int, heads: int
    ) -> tuple[Array, Array]:
        cache, layer = source
        k, v = (restore(_rows(x, layer, first_row, rows, first_head, heads), q.dtype) for x in (cache.k, cache.v))
        return k, v

    return read


def _in_place(source: PyTree[Array | int]) -> RowsInPlace | None:
    """All layers' rows as they are kept; what is kept in 8 bits has to be dequantized first."""
    cache, layer = source
    if isinstance(cache.k, EightBit) or isinstance(cache.v, EightBit):
        return None
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (cache.k, cache.v))
    return RowsInPlace(k, v, jnp.asarray(layer, jnp.int32) * cache.k.shape[1])


def _floating(stored: Stored) -> DTypeLike:
    dtype = dtype_of(stored)
    return jnp.float32 if dtype.itemsize == 1 else dtype


def _rows(
    stored: Any, layer: ArrayLike, row: ArrayLike, rows: int, head: ArrayLike = 0, heads: int | None = None
) -> Any:
    """[B, rows, heads, D] of a layer, of each array that is stored."""

    def some(x: Array) -> Array:
        size = (1, x.shape[1], rows, heads or x.shape[3], x.shape[4])
        return jax.lax.dynamic_slice(x, (layer, 0, row, head, 0), size)[0]

    return jax.tree.map(some, stored)


def _put(stored: Any, new: Array, layer: ArrayLike, row: ArrayLike) -> Any:
    def put(x: Array, rows: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, rows[None], (layer, 0, row, 0, 0))

    return jax.tree.map(put, stored, store(new, dtype_of(stored)))
