"""Who this worker is: an id that changes whenever its session with Postgres does.

The id lives in a page of memory that the main process shares with the children it forks, so that a child that
outlives a lost session acquires steps under the worker's *new* id.
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import Final
from uuid import UUID

__all__ = ["Incarnation"]

LAYOUT: Final = struct.Struct("16sd")
NOBODY: Final = bytes(16)


class Incarnation:
    """The present identity of one worker, shared over forks."""

    __slots__ = ("_page",)

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def worker_id(self) -> UUID | None:
        """The registered incarnation, or None before the first registration."""
        raw, _ = LAYOUT.unpack_from(self._page)
        return UUID(bytes=raw) if raw != NOBODY else None

    def assume(self, worker_id: UUID) -> None:
        """Become a new incarnation, whose session begins now."""
        LAYOUT.pack_into(self._page, 0, worker_id.bytes, time.monotonic())

    def session_age(self) -> float:
        """Return for how many seconds the present session with Postgres has lasted; 0 before the first."""
        raw, since = LAYOUT.unpack_from(self._page)
        return time.monotonic() - since if raw != NOBODY else 0.0
