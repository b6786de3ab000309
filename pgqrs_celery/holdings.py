"""What a worker's main process has received and not finished, and the newest send time it has seen per queue.

Celery's ``worker.state`` is not enough: rate-limited requests are missing from it, a duplicate that ends removes the
original's entry, and its weak sets cannot be read from another thread. Operations on a plain dict are atomic.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

__all__ = ["Held", "Holdings"]


@dataclass(slots=True)
class Held:
    """One received message; ``accepted`` once a process of the pool has begun it."""

    task_id: str
    accepted: bool = False


class Holdings:
    """The received messages of one process."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        self._received: dict[str, datetime] = {}

    def enter(self, key: int, task_id: str) -> None:
        """Note a received message."""
        self._held[key] = Held(task_id)

    def accept(self, key: int) -> None:
        """Note that a received message has been begun."""
        held = self._held.get(key)
        if held is not None:
            held.accepted = True

    def leave(self, key: int) -> None:
        """Note that a message is done with."""
        self._held.pop(key, None)

    def received(self, queue: str, sent_at: datetime) -> None:
        """Note the send time of a message received from a queue."""
        newest = self._received.get(queue)
        if newest is None or sent_at > newest:
            self._received[queue] = sent_at

    def present(self) -> list[Held]:
        """Return everything received and not finished."""
        return list(self._held.values())

    def watermarks(self) -> dict[str, datetime]:
        """Return the newest send time seen per queue."""
        return dict(self._received)
