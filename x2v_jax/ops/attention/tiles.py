"""Which keys a tile of queries attends to, as a table of loop bounds that a kernel reads.

Keys are cut into tiles on one fixed grid. A tile that counts as a whole needs no mask; at most three are cut: the end
of the sink, and both ends of the range behind it. So one row of sixteen integers describes a tile of queries, and one
kernel serves every block of a block-causal clip and every filling of a cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Columns of the table.
SINK_FULL, FIRST_FULL, FULL, CUT = range(4)
CUTS = 4  # the first of three (tile, first key, stop key)
MOST_CUTS = 3
WIDTH = 16


class Span(NamedTuple):
    """Queries [start, stop) attend to the keys [0, sink) and [first_key, stop_key). sink <= first_key."""

    start: int
    stop: int
    first_key: int
    stop_key: int
    sink: int = 0


def tiles_of_length(length: Int[Array, ""] | int, block: int) -> Int[Array, "1 16"]:
    """The row for the keys [0, length); length, at least 1, may be traced. block: keys a tile."""
    length = jnp.asarray(length, jnp.int32)
    full, rest = length // block, length % block
    row = [jnp.zeros_like(full)] * WIDTH
    # What is cut is a tile of its own, and there is none where tiles divide the length.
    row[FULL], row[CUT] = full, (rest > 0).astype(jnp.int32)
    row[CUTS : CUTS + 3] = [full, full * block, length]
    return jnp.stack(row)[None]


def tiles_of_span(span: Span, block: int) -> list[int]:
    """The row for the keys [0, sink) and [first_key, stop_key)."""
    sink_full = span.sink // block
    first_full, stop_full = -(-span.first_key // block), span.stop_key // block
    cuts = [] if span.sink % block == 0 else [(sink_full, sink_full * block, span.sink)]
    if first_full > stop_full:  # both ends lie in one tile
        cuts.append((stop_full, span.first_key, span.stop_key))
        first_full = stop_full
    else:
        if span.first_key < first_full * block:
            cuts.append((first_full - 1, span.first_key, first_full * block))
        if stop_full * block < span.stop_key:
            cuts.append((stop_full, stop_full * block, span.stop_key))
    row = [sink_full, first_full, sink_full + stop_full - first_full, len(cuts)]
    row += [number for cut in cuts for number in cut]
    return row + [0] * (WIDTH - len(row))


def tiles_of_spans(spans: Sequence[Span], rows: int, block: int) -> np.ndarray:
    """[tiles of queries, 16]: one row for every `rows` queries of a span, the last of which may be short."""
    table = [tiles_of_span(span, block) for span in spans for _ in range(-(-(span.stop - span.start) // rows))]
    return np.asarray(table, np.int32)


def check_spans(spans: Sequence[Span], queries: int, keys: int) -> None:
    """Raises ValueError unless spans cover all queries in order and ask for keys that there are, for none twice."""
    position = 0
    for span in spans:
        if span.start != position or span.stop <= span.start:
            raise ValueError(f"{span} does not go on at query {position}")
        if not 0 <= span.sink <= span.first_key < span.stop_key <= keys:
            raise ValueError(f"{span} asks for keys that are not within {keys}, or for some of them twice")
        position = span.stop
    if position != queries:
        raise ValueError(f"the spans end at query {position} of {queries}")
