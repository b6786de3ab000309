"""Posting: from a finished message to a row of our own broker, without a channel.

Celery's own sender decides where a message goes and tells the signals, and then calls ``publish`` of a producer. What
kombu's producer does from there on (copy and bind entities, declare, prepare, hand on to a channel) is a third of what
it costs to send a message, and for one that goes to one queue of our own broker it comes down to the few lines here.
Whatever needs more goes through kombu's producer, whose channel hands it to the same collector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import signals
from kombu import Queue
from kombu.entity import maybe_delivery_mode

from pgqrs_celery.circumstances import Box
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.transport.amqp import checked_name
from pgqrs_celery.transport.broker import Broker
from pgqrs_celery.transport.message import outgoing

__all__ = ["Poster"]


class Poster:
    """Stands for a producer while Celery's sender publishes one message: its ``publish`` fills the box."""

    __slots__ = ("_box", "_broker", "_message")

    def __init__(self, broker: Broker, box: Box, message: Outgoing) -> None:
        self._broker = broker
        self._box = box
        self._message = message

    @property
    def connection(self) -> Any:
        """The kombu producer's connection."""
        return self._message.producer.connection

    def publish(
        self,
        body: Any,
        *,
        exchange: Any = None,
        routing_key: str | None = None,
        serializer: str | None = None,
        compression: str | None = None,
        delivery_mode: Any = None,
        declare: Sequence[Any] | None = None,
        headers: dict[str, Any],
        **properties: Any,
    ) -> None:
        """Take what Celery's sender gives a kombu producer."""
        if exchange != "" or not routing_key or compression or isinstance(properties.get("reply_to"), Queue):
            self._message.producer.publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                serializer=serializer,
                compression=compression,
                delivery_mode=delivery_mode,
                declare=declare,
                headers=headers,
                **properties,
            )
            return
        for queue in declare or ():
            self._declare(queue)
        checked_name(routing_key, "queue")
        content_type, encoding, data = self._content(body, serializer)
        for name in ("retry", "retry_policy", "timeout", "confirm_timeout", "mandatory", "immediate"):
            properties.pop(name, None)
        if properties.get("expiration") is not None:
            properties["expiration"] = str(int(properties["expiration"] * 1000))
        properties["priority"] = properties.get("priority") or 0
        properties["delivery_mode"] = maybe_delivery_mode(delivery_mode)
        message = {
            "body": data,
            "headers": headers,
            "properties": properties,
            "content-type": content_type,
            "content-encoding": encoding,
        }
        self._box.messages.append(outgoing(message, "", routing_key))

    def _content(self, body: Any, serializer: str | None) -> tuple[str, str, Any]:
        message = self._message
        # A receiver of the signal may have changed what is in the body; then the row's text is not the message's.
        if body is not message.body or signals.before_task_publish.receivers:
            message.forget_content()
        return message.content(serializer or "json")

    def _declare(self, queue: Any) -> None:
        declared = self._broker.declared
        if declared.get(id(queue)) is not queue:
            self._message.producer.maybe_declare(queue)
            declared[id(queue)] = queue
