"""A checkout of the project, asked in processes of their own."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_INSIDE = pathlib.Path(__file__).with_name("inside.py")
_TIMEOUT_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Checkout:
    """root: the project's folder. tmp: an empty folder for files. wheels: jax's CUDA wheels, for `aot` alone."""

    root: pathlib.Path
    tmp: pathlib.Path
    wheels: pathlib.Path | None = None

    def run(self, *arguments: str, cwd: pathlib.Path | None = None) -> "subprocess.CompletedProcess[str]":
        """`python ARGUMENTS` with the checkout's modules."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd or self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_SECONDS,
        )

    def must_run(self, *arguments: str) -> str:
        """What `run` prints.

        Raises:
            RuntimeError: it fails.
        """
        done = self.run(*arguments)
        if done.returncode:
            raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout

    def inside(self, task: str, *arguments: str) -> Iterator[tuple[str, Any]]:
        """The items that a task of `inside.py` prints, one JSON list [item, value] a line."""
        command = [sys.executable, str(_INSIDE), task, *arguments]
        with subprocess.Popen(
            command, cwd=self.root, env=self._environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                item, value = json.loads(line)
                yield item, value
        if process.returncode:
            raise RuntimeError(f"inside.py {task} ended with {process.returncode}")

    def plain(self, text: str) -> str:
        """A text without what differs from run to run or as code moves: places, line numbers, bodies of tracebacks."""
        for path, name in ((self.tmp, "<tmp>"), (self.root, "<checkout>"), (pathlib.Path.home(), "~")):
            text = text.replace(str(path), name)
        text = re.sub(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)+", "Traceback: ", text)
        text = re.sub(r"[\w./<>~-]+\.py:\d+", "FILE.py:N", text)
        text = re.sub(r"\b\d+\.\d s\b", "N s", text)
        return re.sub(r".*\d%\|.*\n?", "", text)  # progress bars

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
        return kept | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "120",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's remark on slow compilations depends on what else the machine does
            # jax finds a program by a hash of the program, so sharing it between checkouts hides no difference.
            "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "x2v_jax_records"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
