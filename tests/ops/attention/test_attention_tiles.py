"""The table of tiles names every key once that counts, and no other."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from x2v_jax.ops.attention import Span
from x2v_jax.ops.attention.tiles import (
    CUT,
    CUTS,
    FIRST_FULL,
    FULL,
    MOST_CUTS,
    SINK_FULL,
    WIDTH,
    check_spans,
    tiles_of_length,
    tiles_of_span,
    tiles_of_spans,
)


def keys_of(row: list[int], block: int) -> list[int]:
    found = []
    for i in range(row[FULL]):
        tile = i if i < row[SINK_FULL] else row[FIRST_FULL] + i - row[SINK_FULL]
        found += range(tile * block, (tile + 1) * block)
    for cut in range(row[CUT]):
        tile, first, stop = row[CUTS + 3 * cut : CUTS + 3 * cut + 3]
        # A tile without a key would make the softmax of its rows no number, were it the first.
        assert tile * block <= first < stop and first < (tile + 1) * block
        found += range(first, min(stop, (tile + 1) * block))
    return found


@given(
    cuts=st.lists(st.integers(0, 600), min_size=3, max_size=3).map(sorted),
    block=st.sampled_from([64, 128]),
    with_sink=st.booleans(),
)
def test_every_key_of_a_span_is_there_once(cuts: list[int], block: int, with_sink: bool):
    sink, first, stop = cuts
    span = Span(0, 1, first, stop + 1, sink if with_sink else 0)
    row = tiles_of_span(span, block)
    assert len(row) == WIDTH and row[CUT] <= MOST_CUTS
    assert sorted(keys_of(row, block)) == [*range(span.sink), *range(first, stop + 1)]


@given(length=st.integers(1, 1000), block=st.sampled_from([64, 128]))
def test_every_key_of_a_length_is_there_once(length: int, block: int):
    row = np.asarray(tiles_of_length(jnp.int32(length), block))[0].tolist()
    assert keys_of(row, block) == list(range(length))
    used = CUTS + 3 * row[CUT]
    assert row[:used] == tiles_of_span(Span(0, 1, 0, length), block)[:used]


def test_a_span_has_a_row_for_every_thread_block_of_its_queries():
    spans = [Span(0, 130, 0, 130), Span(130, 140, 0, 140)]
    table = tiles_of_spans(spans, 128, 64)
    assert table.shape == (3, WIDTH)
    np.testing.assert_array_equal(table[0], table[1])
    assert (table[2] != table[1]).any()


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([Span(0, 4, 0, 4), Span(5, 8, 0, 4)], "does not go on at query 4"),
        ([Span(0, 8, 0, 9)], "not within 8"),
        ([Span(0, 8, 2, 4, 3)], "twice"),
        ([Span(0, 4, 0, 4)], "end at query 4 of 8"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans: list[Span], said: str):
    with pytest.raises(ValueError, match=said):
        check_spans(spans, 8, 8)
