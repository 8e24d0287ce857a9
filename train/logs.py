"""What a run says about itself: log.jsonl, one JSON object a line, and the same for TensorBoard."""

import json
import math
import pathlib
from collections.abc import Mapping

from tensorboardX import SummaryWriter


class Log:
    """Appends to `directory`/log.jsonl and `directory`/tensorboard. A resumed run goes on in both."""

    def __init__(self, directory: pathlib.Path):
        self._lines = (directory / "log.jsonl").open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float], phase: str | None = None) -> None:
        """Numbers of a step. NaN stands for "not measured in these steps" and is left out."""
        measured = {name: value for name, value in values.items() if not math.isnan(value)}
        head = {"step": step} if phase is None else {"step": step, "phase": phase}
        self._lines.write(json.dumps({**head, **measured}) + "\n")
        self._lines.flush()
        for name, value in measured.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()
