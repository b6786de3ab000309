"""Forks: none happens while one of our threads is in the middle of something.

A fork copies every lock as it stands, but only the thread that forks. A worker's main process forks whenever its pool
replaces a child, and our threads run there beside Celery's own code, which takes locks where one would not look for
them: kombu's ``cached_property`` takes one at every look at ``app.amqp``. If the relay held it in that moment, the
child would wait for it for ever, and with it the first task that it is given.

So such a thread says when it works, and a fork waits for the end of that: milliseconds as a rule. It does not wait
longer than ``PATIENCE``, and for one stretch of work only once: a broker that does not answer must not stop an event
loop.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from typing import Final

__all__ = ["NoFork"]

#: Seconds for which a fork waits.
PATIENCE: Final = 1.0


class NoFork:
    """A ``with`` block in which the process is not forked; one per thread, used again and again."""

    __slots__ = ("__weakref__", "_lock", "_number", "_overdue")

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a thread may fork in its own block
        self._number = next(_numbers)
        #: Whether a fork has waited for the end of the present block in vain.
        self._overdue = False
        _blocks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._overdue = False

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def end(self, until: float) -> bool:
        """Wait for the end of the block, and let no other begin; False where it does not end in time."""
        if self._overdue:
            return self._lock.acquire(blocking=False)
        ended = self._lock.acquire(timeout=max(0.0, until - time.monotonic()))
        self._overdue = not ended
        return ended

    def may_begin(self) -> None:
        """Let blocks begin again."""
        self._lock.release()

    def forget(self) -> None:
        """The thread whose block this is was not copied."""
        self._lock = threading.RLock()


_numbers = itertools.count()
_blocks: weakref.WeakSet[NoFork] = weakref.WeakSet()
_forking = threading.local()


def _before() -> None:
    until = time.monotonic() + PATIENCE
    # Filled one by one: an interrupted wait must not leave a block behind that never begins again.
    _forking.ended = ended = []
    for block in sorted(_blocks, key=lambda block: block._number):  # in order: two threads may fork at the same time
        if block.end(until):
            ended.append(block)


def _after_in_parent() -> None:
    while _forking.ended:
        _forking.ended.pop().may_begin()


def _after_in_child() -> None:
    for block in list(_blocks):
        block.forget()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
