"""Which rows of a data set a training step sees, a function of the seed and the step alone; and batches made ahead.

Resuming therefore needs no state, and any number of hosts agree without talking. The order rests on the raw output of
the Philox bit generator, which NumPy promises not to change, and not on `Generator.permutation`, which it may.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from jaxtyping import Int

from x2v_jax.errors import UserError

_MASK = 2**64 - 1


def epoch_rows(seed: int, step: int, batch_size: int, count: int, stream: int = 0) -> Int[np.ndarray, "n"]:
    """The rows of one step's batch: every epoch shows all rows once, each in an order of its own.

    Args:
        seed: of the run; any whole number.
        step: from 0. Step k takes places k * batch_size and on of the endless row of shuffled epochs, so a batch may
            end one epoch and begin the next.
        batch_size: of all devices and hosts together; host h of n takes `rows[h::n]`.
        count: rows of the data set.
        stream: data that are drawn side by side (a generator's and a critic's) take a number each.

    Returns:
        int64 [batch_size], in 0 … count - 1.

    Raises:
        UserError: an empty data set or batch.

    >>> sorted(np.concatenate([epoch_rows(7, step, 2, 6) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if count < 1:
        raise UserError("the data set has no rows; prepare it again from a source that has some")
    if batch_size < 1 or step < 0:
        raise UserError(f"batch_size is {batch_size} and step {step}; give a batch of 1 or more and steps from 0")
    rows = np.empty(batch_size, np.int64)
    filled = 0
    while filled < batch_size:
        epoch, place = divmod(step * batch_size + filled, count)
        part = _order(seed & _MASK, epoch, count, stream)[place : place + batch_size - filled]
        rows[filled : filled + len(part)] = part
        filled += len(part)
    return rows


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int, stream: int) -> np.ndarray:
    # Arrays, because NumPy would take a list with a number above 2**63 through float64.
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    numbers = np.random.Philox(key=key, counter=counter).random_raw(count)
    order = np.argsort(numbers, kind="stable")
    order.flags.writeable = False
    return order


def read_ahead[Batch](make: Callable[[int], Batch], steps: range, ahead: int) -> Generator[Batch]:
    """make(step) of each step in order, up to `ahead` of them made before they are asked for (0: none).

    The result does not depend on `ahead`, because a batch depends on nothing but its step. An error of `make` is raised
    where its batch is asked for. Close it to end the thread early.

    >>> list(read_ahead(lambda step: step * step, range(4), ahead=2))
    [0, 1, 4, 9]
    """
    if ahead < 1 or not steps:
        yield from map(make, steps)
        return
    import grain  # a second to import, and only training needs it

    # One thread: tasks may keep what they read last, and batches are asked for in order anyway.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    batches: Any = iter(grain.MapDataset.range(steps.start, steps.stop).map(make).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
