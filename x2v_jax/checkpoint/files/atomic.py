"""Files that appear under their name only when they are complete."""

import contextlib
import errno
import os
import pathlib
import shutil
import stat
from collections.abc import Generator

from x2v_jax.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE = 64 << 20  # one write call's bytes: a signal or a full disk is noticed after each


class CompleteFile:
    """The file under construction, written at any positions in any order.

    Args:
        path: the final name, for messages.
        descriptor: an open file that may be written.
    """

    def __init__(self, path: pathlib.Path, descriptor: int):
        self._path = path
        self._descriptor = descriptor

    def write_at(self, position: int, data: bytes | memoryview) -> None:
        """Write all of `data`, bytes or a contiguous memoryview of bytes, from byte `position` on."""
        view = memoryview(data)
        done = 0
        with _explained(self._path):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done : done + _PIECE], position + done)


@contextlib.contextmanager
def complete_file(path: str | os.PathLike[str], size: int) -> Generator[CompleteFile]:
    """A context in which a file is written beside `path`; at its end the file is synced to disk and renamed to `path`.

    After an error the unfinished file is removed. After a kill or a power cut it stays, as `.NAME.incomplete`, and the
    next attempt writes over it. An older file at `path` stays until the new one replaces it.

    Args:
        path: the final name.
        size: the bytes that will be written, to notice a full disk at the beginning and not after an hour.

    Raises:
        UserError: the folder is missing or may not be written, the disk is full, or another process is writing the
            same file.
    """
    final = pathlib.Path(path)
    with _explained(final):
        if not final.name or final.is_dir():
            raise UserError(f"cannot write {str(final)!r}: it is a folder. Give the name of a file.")
        unfinished = final.with_name(f".{final.name}.incomplete")
        descriptor = _open_locked(unfinished)
    try:
        with _explained(final):
            free = shutil.disk_usage(final.parent).free
        if free < size:
            raise UserError(
                f"cannot write {str(final)!r}: it needs {size:,} bytes and the disk has {free:,} free."
                " Free some space or write to another disk."
            )
        yield CompleteFile(final, descriptor)
        with _explained(final):
            os.fsync(descriptor)
            os.replace(unfinished, final)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    finally:
        os.close(descriptor)
    _sync_folder(final.parent)


@contextlib.contextmanager
def _explained(final: pathlib.Path) -> Generator[None]:
    """Turns the system's errors into sentences for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            fix = "The disk or the quota is full: free some space or write to another disk; nothing was left behind."
        else:
            fix = "Give a name in an existing folder that you may write to."
        raise UserError(f"cannot write {str(final)!r}: {error.strerror or error}. {fix}") from error


def _open_locked(path: pathlib.Path) -> int:
    """A descriptor of the emptied file `path`, which this process alone writes."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path)
            held, named = os.fstat(descriptor), _stat(path)
            # Another process may have finished between our open and our lock; then this file is now its result.
            if named is not None and os.path.samestat(held, named):
                if not stat.S_ISREG(held.st_mode) or held.st_nlink != 1:
                    raise UserError(f"cannot write {str(path)!r}: it is not a plain file. Remove it.")
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: pathlib.Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks outside POSIX
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"cannot write {str(path)!r}: another process is writing it. Wait for it or stop it.") from None
    except OSError:
        return  # a network file system without locks


def _stat(path: pathlib.Path) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _sync_folder(folder: pathlib.Path) -> None:
    # Makes the rename itself survive a power cut; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
