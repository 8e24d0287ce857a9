"""The rows of a step: a function of seed and step, every row once an epoch."""

import threading

import numpy as np
import pytest

from train.data.order import epoch_rows, read_ahead
from x2v_jax.errors import UserError


@pytest.mark.parametrize(("count", "batch"), [(10, 5), (10, 3), (7, 1), (3, 8), (1, 4)])
def test_every_epoch_shows_every_row_once(count: int, batch: int):
    drawn = np.concatenate([epoch_rows(5, step, batch, count) for step in range(4 * count)])
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_seeds_and_streams_have_orders_of_their_own():
    first = epoch_rows(1, 0, 64, 64)
    for other in (epoch_rows(1, 1, 64, 64), epoch_rows(2, 0, 64, 64), epoch_rows(1, 0, 64, 64, stream=1)):
        assert not np.array_equal(first, other)


def test_the_order_never_changes():
    # Runs that were begun with an earlier version must go on with the same data.
    assert epoch_rows(7, 0, 8, 8).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]
    assert epoch_rows(-1, 5, 4, 9, stream=2).tolist() == [5, 1, 0, 8]


def test_a_step_does_not_need_the_steps_before_it():
    late = epoch_rows(3, 1_000_003, 16, 50_000)
    assert np.array_equal(late, epoch_rows(3, 1_000_003, 16, 50_000)) and len(set(late.tolist())) == 16


@pytest.mark.parametrize("arguments", [(0, 0, 1, 0), (0, 0, 0, 5), (0, -1, 1, 5)])
def test_nothing_to_draw_is_a_sentence(arguments: tuple[int, ...]):
    with pytest.raises(UserError, match=r"; (prepare|give)"):
        epoch_rows(*arguments)


def test_batches_are_made_ahead_and_in_order():
    made, may_go_on = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 2:
            may_go_on.set()
        return step * 10

    batches = read_ahead(make, range(5), ahead=2)
    assert next(batches) == 0
    assert may_go_on.wait(5), "two steps ahead are made without being asked for"
    assert list(batches) == [10, 20, 30, 40] and made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_in_making_a_batch_is_raised_at_that_batch(ahead: int):
    batches = read_ahead(lambda step: 1 // (step - 8), range(7, 10), ahead)
    assert next(batches) == -1
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_closing_ends_the_thread_that_reads_ahead():
    before = threading.active_count()
    batches = read_ahead(lambda step: step, range(1000), ahead=2)
    assert next(batches) == 0
    batches.close()
    for thread in threading.enumerate()[before:]:
        thread.join(5)
    assert threading.active_count() == before
