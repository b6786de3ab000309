"""A bell: wakes an event loop from another thread, and from a forked child.

A pool child that publishes the next task rings the bell of its own worker, which claims the message without a NOTIFY.
For that the first bell of a process is made when this module is imported, before any pool is forked; the page of memory
beside it says what the worker consumes, so that a child rings only where it is heard.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from typing import Final

__all__ = ["Bell", "inherited", "lend"]

#: One byte for "there is news"; the number of consumed queues, and eight bytes for each.
NEWS: Final = 0
COUNT: Final = struct.Struct("Q")
COUNT_AT: Final = 8
QUEUES_AT: Final = COUNT_AT + COUNT.size
DIGEST: Final = 8
#: Whoever consumes more queues is woken by a NOTIFY for what comes to the rest of them.
MOST_QUEUES: Final = (mmap.PAGESIZE - QUEUES_AT) // DIGEST


class Bell:
    """A file descriptor that becomes readable when somebody rings."""

    __slots__ = ("_page", "_read", "_write", "lent")

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._read, self._write = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.lent = False

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._read

    def ring(self, news: bool = False) -> None:
        """Wake the owner; ``news`` says that there may be messages to claim."""
        if news:
            self._page[NEWS] = 1
        with suppress(BlockingIOError):  # it is ringing already
            if self._read == self._write:
                os.eventfd_write(self._write, 1)
            else:
                os.write(self._write, b"\1")

    def hush(self) -> bool:
        """Stop ringing; return whether there was news."""
        with suppress(BlockingIOError):
            if self._read == self._write:
                os.eventfd_read(self._read)  # not os.read, which eventlet makes wait
            elif select.select([self._read], [], [], 0)[0]:
                os.read(self._read, 4096)
        news = bool(self._page[NEWS])
        if news:  # else somebody may set it at this moment, whose ring is still to come
            self._page[NEWS] = 0
        return news

    def listen_for(self, addresses: Iterable[str]) -> None:
        """Say which queues the owner consumes."""
        digests = b"".join([_digest(address) for address in addresses][:MOST_QUEUES])
        COUNT.pack_into(self._page, COUNT_AT, 0)  # another process may be reading: it finds too few, never a wrong one
        self._page[QUEUES_AT : QUEUES_AT + len(digests)] = digests
        COUNT.pack_into(self._page, COUNT_AT, len(digests) // DIGEST)

    def hears(self, address: str) -> bool:
        """Return whether the owner consumes this queue."""
        (count,) = COUNT.unpack_from(self._page, COUNT_AT)
        wanted, end = _digest(address), QUEUES_AT + count * DIGEST
        return any(self._page[at : at + DIGEST] == wanted for at in range(QUEUES_AT, end, DIGEST))

    def close(self) -> None:
        """Close the descriptors of a bell that is not the process's own."""
        os.close(self._read)
        if self._write != self._read:
            os.close(self._write)


@lru_cache(maxsize=1024)
def _digest(address: str) -> bytes:
    return blake2b(address.encode(), digest_size=DIGEST).digest()


_own = Bell()
_inherited: Bell | None = None


def lend() -> Bell:
    """Return the process's bell where it is free, else one that belongs to the caller alone."""
    if _own.lent:
        return Bell()
    _own.lent = True
    return _own


def give_back(bell: Bell) -> None:
    """End the use of a bell that was lent."""
    bell.listen_for(())
    if bell is _own:
        bell.lent = False
    else:
        bell.close()


def inherited() -> Bell | None:
    """Return the bell of the process this one was forked from, or None."""
    return _inherited


def own() -> Bell:
    """Return the process's bell."""
    return _own


def _after_fork() -> None:
    global _own, _inherited
    _inherited, _own = _own, Bell()


os.register_at_fork(after_in_child=_after_fork)
