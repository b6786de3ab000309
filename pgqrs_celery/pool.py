"""The pool: sessions that nobody uses at the moment, and how many may be in use at the same time."""

from __future__ import annotations

import threading

from pgqrs_celery.session import Session

__all__ = ["Pool"]


class Pool:
    """Idle sessions of one process, with so many places for those that are lent.

    Threads may share it; it does not survive a fork. A thread that has a session does not wait for the places of
    others, who may be waiting for its own: where none is free, its further sessions have none.
    """

    __slots__ = ("_depths", "_free", "_freed", "_idle", "_lock", "_waiting")

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._free = size
        self._waiting = 0
        self._idle: list[Session] = []
        #: How many sessions this thread has been lent.
        self._depths = threading.local()

    def enter(self) -> tuple[Session | None, bool]:
        """Take a place, waiting for one where that is safe; returns an idle session, if any, and whether it has one."""
        depth = getattr(self._depths, "depth", 0)
        with self._lock:
            while self._free == 0 and depth == 0:
                self._waiting += 1
                try:
                    self._freed.wait()
                finally:
                    self._waiting -= 1
            placed = self._free > 0
            if placed:
                self._free -= 1
            session = self._idle.pop() if self._idle else None
        self._depths.depth = depth + 1
        return session, placed

    def leave(self, session: Session | None, *, placed: bool) -> None:
        """Give a place back, with a session for others if there is one to be used again."""
        depths = self._depths
        depths.depth = max(0, getattr(depths, "depth", 0) - 1)  # 0 where another thread has taken it
        with self._lock:
            if session is not None:
                self._idle.append(session)
            if placed:
                self._free += 1
                if self._waiting:
                    self._freed.notify()

    def drain(self) -> list[Session]:
        """Take all idle sessions out of the pool."""
        with self._lock:
            idle, self._idle = self._idle, []
        return idle
