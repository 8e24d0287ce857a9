"""What the commands that write a folder show while they work, and where they are stopped."""

import os
from collections.abc import Callable

Work = Callable[[Callable[[int, int], None]], tuple[str, ...]]


def run(work: Work, destination: str, follows: Callable[[str], str | None] = lambda destination: None) -> None:
    """Calls work(progress) under a bar of bytes, and prints the notes that it returns.

    Args:
        follows: the destination -> the command that a user may want next.
    """
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        notes = work(progress)
    print("\n".join([*(f"note: {note}" for note in notes), f"wrote {destination}"]))
    if (command := follows(destination)) is not None:
        print(f"run it with: {command}")


def interrupted(destination: str | None) -> str:
    """What Ctrl-C leaves: it may come between the last rename and the end."""
    is_there = destination is not None and os.path.exists(destination)
    left = f"{destination} is complete, or as it was" if is_there else "nothing is left at the destination"
    return f"interrupted; {left}"
