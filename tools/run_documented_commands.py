"""Runs the commands that documents promise: every fenced block that starts with ```bash run.

    python tools/run_documented_commands.py README.md docs/*.md

Blocks run in order from the repository's root, in shells that stop at the first failure. Exit code 1 if one fails.
"""

import pathlib
import re
import subprocess
import sys
import time

_BLOCK = re.compile(r"^```bash run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TIMEOUT_SECONDS = 900


def blocks(text: str) -> list[str]:
    """The runnable blocks of a document."""
    return _BLOCK.findall(text)


def main(paths: list[str]) -> int:
    failed = 0
    for path in paths:
        for block in blocks(pathlib.Path(path).read_text()):
            first = block.strip().splitlines()[0]
            started = time.monotonic()
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                cwd=_ROOT,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
            )
            seconds = time.monotonic() - started
            print(f"{'ok    ' if result.returncode == 0 else 'FAILED'} {seconds:6.1f} s  {path}: {first}", flush=True)
            if result.returncode != 0:
                failed += 1
                print(result.stdout[-2000:], result.stderr[-4000:], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
