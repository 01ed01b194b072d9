"""Locks between processes that write the same output: files beside it, held while the work lasts.

The system frees a lock when its process ends, however it ends; a file that a killed process leaves behind
holds nothing and is used again.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of file systems without locks."""


class HeldError(Exception):
    """Another process holds the lock."""


def output_lock(out: Path) -> Path:
    """Return the lock file of an output, `.OUT.n3c-lock` beside it; `out` is resolved."""
    return out.with_name(f".{out.name}.n3c-lock")


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Generator[None]:
    """Hold the lock file `path`, whose folder exists, and remove it in the end.

    Where another process holds it, `waiting` is called and then the lock is waited for; without `waiting`
    HeldError is raised. Raises OSError where the file cannot be made.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout, UnixFileLock  # few commands write

    def acquired(kind: type[BaseFileLock]) -> BaseFileLock:
        lock = kind(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not path.exists():
                _require_creatable(path)
            if waiting is None:
                raise HeldError(str(path)) from None
            waiting()
            lock.acquire()
        return lock

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file system has no locks: a lock by existence takes their place
        try:
            lock = acquired(FileLock)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            lock = acquired(SoftFileLock)
    try:
        yield
    finally:
        if isinstance(lock, UnixFileLock):
            # The other kinds remove their file. Here it must go while it is held: who has opened it and waits
            # then sees that what it gets has no name any more, and makes a new one.
            with suppress(OSError):
                path.unlink()
        lock.release()


def _require_creatable(path: Path) -> None:
    """Raise OSError where no file can be made beside `path`, as in /proc: filelock takes that for another holder."""
    with TemporaryFile(dir=path.parent):
        pass
