"""Makes the batches of coming steps in a thread, while the device works on the present one."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator


def prefetch[Batch](make: Callable[[int], Batch], steps: Iterable[int], ahead: int = 2) -> Iterator[Batch]:
    """make(step) of each step in order, up to `ahead` of them made before they are asked for.

    The result does not depend on `ahead`, because a batch depends on nothing but its step. An error of `make` is raised
    where its batch is asked for.

    >>> list(prefetch(lambda step: step * step, range(4)))
    [0, 1, 4, 9]
    """
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
        coming: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        try:
            for step in steps:
                coming.append(executor.submit(make, step))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
