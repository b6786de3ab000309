"""Posting: from a finished message to a row of our own broker, without a channel.

Celery's own sender decides where a message goes and tells the signals, and then calls ``publish`` of a producer. What
kombu's producer does from there on (copy and bind entities, declare, prepare, hand on to a channel) is a third of what
it costs to send a message, and for one that goes to one queue of our own broker it comes down to the few lines here.
Whatever needs more goes through kombu's producer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kombu import Queue
from kombu.entity import maybe_delivery_mode
from kombu.serialization import dumps

from pgqrs_celery.envelope import Content
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.store.messages import NewMessage
from pgqrs_celery.transport.amqp import checked_name
from pgqrs_celery.transport.broker import Broker
from pgqrs_celery.transport.message import outgoing

__all__ = ["Poster"]


class Poster:
    """Stands for a kombu producer while Celery's sender publishes one message."""

    __slots__ = ("_broker", "_message", "_producer", "_take")

    def __init__(
        self, broker: Broker, producer: Any, take: Callable[[NewMessage], Any], message: Outgoing | None = None
    ) -> None:
        """``take`` is given the row; ``message`` is what it is made of, where that has been serialized already."""
        self._broker = broker
        self._producer = producer
        self._take = take
        self._message = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

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
        headers: dict[str, Any] | None = None,
        retry: bool = False,
        retry_policy: dict[str, Any] | None = None,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **properties: Any,
    ) -> Any:
        """Publish as ``kombu.Producer.publish`` does; the same message again is no duplicate."""
        if exchange != "" or not routing_key or compression or isinstance(properties.get("reply_to"), Queue):
            return self._producer.publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                serializer=serializer,
                compression=compression,
                delivery_mode=delivery_mode,
                declare=declare,
                headers=headers,
                retry=retry,
                retry_policy=retry_policy,
                timeout=timeout,
                confirm_timeout=confirm_timeout,
                **properties,
            )
        checked_name(routing_key, "queue")
        content_type, encoding, data = self._content(body, serializer or "json")
        if properties.get("expiration") is not None:
            properties["expiration"] = str(int(properties["expiration"] * 1000))
        properties["priority"] = properties.get("priority") or 0
        properties["delivery_mode"] = maybe_delivery_mode(delivery_mode)
        message = {
            "body": data,
            "headers": headers or {},
            "properties": properties,
            "content-type": content_type,
            "content-encoding": encoding,
        }
        post = self._post
        if retry:
            post = self._producer.connection.ensure(self._producer, post, **(retry_policy or {}))
        return post(outgoing(message, "", routing_key), declare or ())

    def _content(self, body: Any, serializer: str) -> Content:
        message = self._message
        if message is None or body is not message.body:
            return dumps(body, serializer=serializer)
        return message.content(serializer)

    def _post(self, row: NewMessage, declare: Sequence[Any]) -> None:
        declared = self._broker.declared
        for queue in declare:
            if declared.get(id(queue)) is not queue:
                self._producer.maybe_declare(queue)
                declared[id(queue)] = queue
        self._take(row)
