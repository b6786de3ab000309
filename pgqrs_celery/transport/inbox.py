"""The inbox: messages that have arrived and were not handed out yet."""

from __future__ import annotations

from collections import deque

from pgqrs_celery.store.messages import Claimed
from pgqrs_celery.transport.appetite import Subscriber

__all__ = ["Inbox"]


class Inbox:
    """Messages in the order they came, each with the subscriber it is for."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Subscriber, Claimed]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, subscriber: Subscriber, message: Claimed) -> None:
        """Add a message."""
        self._waiting.append((subscriber, message))

    def count(self, subscriber: Subscriber) -> int:
        """Return how many messages wait for a subscriber."""
        return sum(owner is subscriber for owner, _ in self._waiting)

    def deliver_one(self) -> bool:
        """Hand out the first message; returns whether it came over a volatile queue. Raises what a callback raises."""
        subscriber, message = self._waiting.popleft()
        subscriber.deliver(message)
        return message.queue in subscriber.volatile

    def withdraw(self, subscriber: Subscriber) -> list[Claimed]:
        """Return, and forget, what is there for queues a subscriber has left."""
        wanted = {*subscriber.queues, *subscriber.volatile}
        found, kept = [], deque[tuple[Subscriber, Claimed]]()
        for owner, message in self._waiting:
            if owner is subscriber and message.queue not in wanted:
                found.append(message)
            else:
                kept.append((owner, message))
        self._waiting = kept
        return found
