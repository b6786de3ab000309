"""Broadcasts: messages of volatile queues, which are taken for good and die with their connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from pgqrs_celery.session import Session
from pgqrs_celery.store.messages import Claimed

__all__ = ["Taken", "take"]


@dataclass(frozen=True, slots=True)
class Taken:
    """A message that was taken; an ``expired`` one is only there to be thrown away."""

    message_id: UUID
    position: int
    queue: str
    priority: int
    expired: bool | None
    headers: str
    properties: str
    body: bytes

    def as_claimed(self) -> Claimed:
        """Return the message as one that was claimed, for the first time."""
        return Claimed(
            self.message_id, self.position, self.queue, self.priority, 1, 0, self.headers, self.properties, self.body
        )


def take(session: Session, queues: Sequence[str], *, count: int) -> list[Taken]:
    """Remove and return up to ``count`` messages, by priority, then in the order they were sent."""
    taken = session.many(Taken, "broadcasts.take", {"queues": list(queues), "count": count})
    return sorted(taken, key=lambda t: (-t.priority, t.position))
