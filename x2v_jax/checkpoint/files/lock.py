"""Folders that one process at a time works in."""

import json
import logging
import os
import pathlib
import socket
import time
from typing import Self

from x2v_jax.checkpoint.files.json_file import is_json_object
from x2v_jax.errors import UserError

_log = logging.getLogger(__name__)
_NAME = ".lock"


class FolderLock:
    """A folder that no other process works in until `release`, or until this process is gone, however it ends.

    The lock is the system's (flock), on a file that tells others who holds it. Where the file system has no such locks,
    as some in networks, that is logged as a warning, and nothing is held.

    Args:
        folder: it exists.
        fix: what another who comes should do, for the error: "choose another --config.run_dir".

    Raises:
        UserError: another process holds it, or the folder may not be written.
    """

    def __init__(self, folder: pathlib.Path, fix: str):
        self._path = folder / _NAME
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise UserError(f"{str(folder)!r} cannot be written: {error.strerror}; {fix}") from None
        try:
            self._take(folder, fix)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)  # the file stays: removing it would let two hold locks of one name
            self._descriptor = -1

    def _take(self, folder: pathlib.Path, fix: str) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks outside POSIX
            _log.warning("%s is not locked: this system has no locks of files; start nothing else in it", folder)
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{str(folder)!r} is in use{self._by_whom()}; wait for it or stop it, or {fix}") from None
        except OSError as error:
            _log.warning("%s is not locked (%s); start nothing else in it", folder, error.strerror)
            return
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _by_whom(self) -> str:
        """What the holder wrote; nothing where it has not come to it yet."""
        try:
            holder = json.loads(os.pread(self._descriptor, 1000, 0))
        except (OSError, ValueError):
            return ""
        if not is_json_object(holder):
            return ""
        return f" by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
