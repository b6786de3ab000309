"""Where a published message goes: into the database at once, or to whoever collects messages just now.

The broker's channels ask ``current`` before they insert anything. A collector is a step's unit of work, a user's own
transaction (``in_transaction``), or a ``batch``; it is bound to the thread or task that opened it, by a context
variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Protocol

from pgqrs_celery.store.messages import NewMessage

__all__ = ["Batch", "Collector", "Publisher", "batch", "collecting", "current"]

#: Messages in one statement of a batch.
BATCH_SIZE: Final = 1000


class Publisher(Protocol):
    """The broker a message was on its way to."""

    @property
    def schema(self) -> str:
        """The schema of its tables."""

    def publish_now(self, new: Sequence[NewMessage]) -> None:
        """Insert messages in one statement and wake who waits for them."""


class Collector(Protocol):
    """Takes messages instead of an immediate insert, and answers for their publication."""

    def add_message(self, message: NewMessage, publisher: Publisher) -> None:
        """Take one message."""


class Batch:
    """Messages that go out together, ``BATCH_SIZE`` to a statement."""

    def __init__(self, size: int = BATCH_SIZE) -> None:
        self._size = size
        self._waiting: dict[Publisher, list[NewMessage]] = {}

    def add_message(self, message: NewMessage, publisher: Publisher) -> None:
        """Take one message; a full batch goes out."""
        waiting = self._waiting.setdefault(publisher, [])
        waiting.append(message)
        if len(waiting) >= self._size:
            self._send(publisher)

    def flush(self) -> None:
        """Publish what waits. What could not be sent stays, so that calling this again is no duplicate."""
        for publisher in list(self._waiting):
            self._send(publisher)

    def discard(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def _send(self, publisher: Publisher) -> None:
        waiting = self._waiting[publisher]
        publisher.publish_now(waiting)
        del waiting[:]


_current: ContextVar[Collector | None] = ContextVar("pgqrs_outbox", default=None)


def current() -> Collector | None:
    """Return the collector of this context, or None where messages go out at once."""
    return _current.get()


@contextmanager
def collecting(collector: Collector | None) -> Iterator[None]:
    """Hand every message published inside to the collector; None lets them out at once again."""
    token = _current.set(collector)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def batch(size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Publish the messages sent inside together, at the end, in as few statements as possible.

    An exception inside discards those that have not gone out yet. Inside another collector this changes nothing: that
    one decides.
    """
    collected = Batch(size)
    if current() is not None:
        yield collected
        return
    with collecting(collected):
        yield collected
    collected.flush()
