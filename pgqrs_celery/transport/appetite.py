"""Who wants messages of which queues, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pgqrs_celery.store.messages import Claimed

__all__ = ["Appetite", "Held", "Subscriber"]


class Subscriber(Protocol):
    """Somebody who consumes from queues: a channel."""

    @property
    def queues(self) -> Sequence[str]:
        """The queues whose messages are leased."""

    @property
    def volatile(self) -> Sequence[str]:
        """The queues whose messages are taken for good."""

    def room(self, arrived: int) -> tuple[int, bool]:
        """Return how many more messages may come, and whether at most half of the prefetch is in flight.

        ``arrived`` messages are leased for it and not handed to it yet.
        """

    def deliver(self, claimed: Claimed) -> None:
        """Take a message; may raise what the consumer's callback raises."""


@dataclass(slots=True)
class Held:
    """A leased message of this process that is neither acknowledged nor given back."""

    claimed: Claimed
    subscriber: Subscriber
    since: float


@dataclass(slots=True)
class Appetite:
    """What is known about one subscriber's queues: ``hungry`` while there may be something in them.

    ``news`` is what has been heard since the statement under way was sent: its answer may be older than that.
    """

    subscriber: Subscriber
    hungry: bool = True
    news: bool = True

    def hear(self) -> None:
        """There may be something now."""
        self.hungry = self.news = True

    def settle(self, more: bool) -> None:
        """Take an answer: whether there is more."""
        self.hungry = more or self.news
