"""Makes the batches of coming steps in a thread of Grain's, while the device works on the present one."""

from collections.abc import Callable, Generator
from typing import Any


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
