"""Sleep: whether the database takes a consumer for one that waits to be notified, as far as the consumer can know.

A publisher that finds a sleeper wakes it and says so, but the notification may come late: when the consumer has looked
by itself, found nothing and fallen asleep again. So naps are numbered, and a publisher says in which one it came.
"""

from __future__ import annotations

import time

__all__ = ["Sleep"]


class Sleep:
    """The sleep of one consumer."""

    __slots__ = ("_found", "_nap", "must_rise", "since")

    def __init__(self) -> None:
        #: Since when the database knows that the consumer sleeps; None where it does not.
        self.since: float | None = None
        #: Whether the consumer has something to hand out, and the database may still take it for asleep.
        self.must_rise = False
        self._nap = 0
        #: The last nap in which somebody has found the consumer.
        self._found = 0

    def begin(self) -> int:
        """Begin another nap, and return its number."""
        self._nap += 1
        return self._nap

    def began(self) -> None:
        """The database has it. Somebody may have found the consumer at once, and been heard before this answer."""
        if self._found != self._nap:
            self.since = time.monotonic()

    def end(self) -> None:
        """The database is told that the consumer is awake, or has forgotten it."""
        self.since, self.must_rise = None, False

    def found(self, nap: int) -> None:
        """Somebody has found the consumer in a nap, woken it and given it something."""
        if nap == self._nap:
            self.since, self._found = None, nap
        else:
            self.must_rise = True

    @property
    def is_known(self) -> bool:
        """Whether the database may take the consumer for asleep."""
        return self.since is not None or self.must_rise
