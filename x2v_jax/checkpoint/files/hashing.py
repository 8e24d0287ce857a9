"""SHA-256 of large files in a thread beside the work that reads them too (hashlib lets other threads run)."""

import concurrent.futures
import hashlib
import pathlib
import threading
from collections.abc import Iterable
from typing import Self

from x2v_jax.errors import UserError

_PIECE = 4 << 20


class HashThread:
    """A context that hashes files in the background.

    >>> with HashThread([pathlib.Path(__file__)]) as hashes:
    ...     list(hashes.results()[pathlib.Path(__file__)])
    ['bytes', 'sha256']
    """

    def __init__(self, files: Iterable[pathlib.Path]):
        self._files = list(dict.fromkeys(files))
        self._stop = threading.Event()
        self._executor = concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._futures = {file: self._executor.submit(self._hash, file) for file in self._files}
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._executor.shutdown(cancel_futures=True)

    def results(self) -> dict[pathlib.Path, dict[str, int | str]]:
        """Waits for all files: file -> {"bytes": size, "sha256": hex digest}."""
        return {file: future.result() for file, future in self._futures.items()}

    def _hash(self, path: pathlib.Path) -> dict[str, int | str]:
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_PIECE))
        try:
            with path.open("rb", buffering=0) as file:
                while not self._stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
                    size += count
        except OSError as error:
            raise UserError(f"{path}: cannot be read to its end ({error.strerror})") from None
        return {"bytes": size, "sha256": digest.hexdigest()}
