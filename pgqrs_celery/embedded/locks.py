"""Locks on files that the kernel drops when their holder ends, however it ends (``flock``)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from pgqrs_celery.exceptions import EmbeddedUnavailable

__all__ = ["FileLock"]

# An exclusive lock must stay with the process that took it; see `FileLock`.
_exclusive: set[FileLock] = set()


class FileLock:
    """A held lock on ``path``: shared, or exclusive.

    A lock belongs to the open file, and a forked child has the same open file. For leases that is what we
    want: the children of a worker use the server, too. An exclusive lock is closed in forked children.
    """

    __slots__ = ("_identity", "fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._identity = _identity(os.fstat(fd))

    @classmethod
    def try_shared(cls, path: Path) -> FileLock | None:
        """Take a shared lock; None while somebody holds an exclusive one."""
        return cls._try(path, fcntl.LOCK_SH)

    @classmethod
    def try_exclusive(cls, path: Path) -> FileLock | None:
        """Take an exclusive lock; None while somebody holds any."""
        lock = cls._try(path, fcntl.LOCK_EX)
        if lock is not None:
            _exclusive.add(lock)
        return lock

    @classmethod
    def _try(cls, path: Path, operation: int) -> FileLock | None:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            lock = cls(path, fd)
            try:
                fcntl.flock(fd, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return None
            except OSError as error:
                lock.close()
                raise EmbeddedUnavailable(f"{path}: files cannot be locked there ({error.strerror})") from error
            if lock.in_place:
                return lock
            lock.close()  # somebody removed the file between open and lock

    @property
    def in_place(self) -> bool:
        """Whether it is still held, on the file that the path names now.

        A program that turns itself into a daemon closes all descriptors, and whatever it opens next gets
        their numbers.
        """
        try:
            return self._identity == _identity(os.fstat(self.fd)) == _identity(self.path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Close this process' descriptor; the lock lives on in a process that inherited it."""
        _exclusive.discard(self)
        try:
            ours = self._identity == _identity(os.fstat(self.fd))
        except OSError:
            return
        if ours:
            os.close(self.fd)


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _close_exclusive() -> None:
    for lock in tuple(_exclusive):
        lock.close()


os.register_at_fork(after_in_child=_close_exclusive)
