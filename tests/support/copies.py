"""Copies of messages, as a broker delivers them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery, signals

__all__ = ["Message", "sent_messages"]


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it went to the broker."""

    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: Any
    queue: str

    def deliver_again(self, app: Celery) -> None:
        """Put a copy into the message's queue, past everything that looks at what is sent."""
        with app.amqp.producer_pool.acquire(block=True) as producer:
            producer.publish(
                self.body,
                exchange="",
                routing_key=self.queue,
                serializer="json",
                headers=dict(self.headers),
                **self.properties,
            )


@contextmanager
def sent_messages() -> Iterator[dict[str, Message]]:
    """Collect the messages that this process sends, by task id."""
    messages: dict[str, Message] = {}

    def collect(headers: Any, properties: Any, body: Any, routing_key: str, **_: Any) -> None:
        messages[headers["id"]] = Message(dict(headers), dict(properties), body, routing_key)

    signals.before_task_publish.connect(collect, weak=False)
    try:
        yield messages
    finally:
        signals.before_task_publish.disconnect(collect)
