"""Declaring: exchanges, queues and bindings in AMQP's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from amqp.protocol import queue_declare_ok_t

from pgqrs_celery.store import consumers, messages, queues
from pgqrs_celery.transport.amqp import (
    checked_name,
    not_found,
    not_implemented,
    precondition_failed,
    topic_pattern,
)
from pgqrs_celery.transport.arguments import queue_of
from pgqrs_celery.transport.broker import Broker

if TYPE_CHECKING:
    from pgqrs_celery.transport.transport import Transport

__all__ = ["Declarations"]


class Declarations:
    """The part of a channel that declares."""

    broker: Broker
    _transport: Transport

    def exchange_declare(
        self,
        exchange: str | None = None,
        type: str = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
    ) -> None:
        """Declare an exchange: remember its type, which its bindings will carry."""
        kind = type or "direct"
        name = checked_name(exchange or f"amq.{kind}", "exchange")
        known = self._transport.exchanges.get(name)
        if passive:
            if known is None and not self.broker.call(lambda s: queues.bindings(s, name)):
                raise not_found(f"no exchange {name!r}", "Channel.exchange_declare")
            return
        if kind not in self._transport.implements.exchange_type:
            raise not_implemented(
                f"exchange {name!r}: type {kind!r}; this broker has direct, topic and fanout",
                "Channel.exchange_declare",
            )
        if known is not None and known != kind:
            raise precondition_failed(
                f"exchange {name!r} was declared with type {known!r}, not {kind!r}",
                "Channel.exchange_declare",
            )
        self._transport.exchanges[name] = kind

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete an exchange with its bindings."""
        self._transport.exchanges.pop(exchange, None)
        if if_unused and self.broker.call(lambda s: queues.bindings(s, exchange)):
            return
        self.broker.call(lambda s: queues.delete_exchange(s, exchange))

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> queue_declare_ok_t:
        """Declare a queue; the answer's message count is exact where asked passively, else it is 0."""
        name = checked_name(queue or f"amq.gen-{uuid4()}", "queue")
        if passive:
            found, size, users = self.broker.call(
                lambda s: (queues.find(s, name), messages.size(s, name), queues.consumers(s, name))
            )
            if found is None and not size:
                raise not_found(f"no queue {name!r}", "Channel.queue_declare")
            return queue_declare_ok_t(name, size, users)
        volatile = not durable and (auto_delete or exclusive)
        declared = queue_of(name, arguments or {}, volatile=volatile, auto_delete=auto_delete or exclusive)
        self.broker.call(lambda s: queues.declare(s, declared))
        self._transport.volatile[name] = volatile
        return queue_declare_ok_t(name, 0, 0)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> int:
        """Delete a queue with its bindings and messages; return how many messages there were."""

        def work(session: Any) -> int:
            if if_unused and queues.consumers(session, queue):
                return 0
            if if_empty and queues.holds_messages(session, queue):
                return 0
            return queues.delete(session, [queue])

        self._transport.volatile.pop(queue, None)
        return self.broker.call(work)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Let an exchange route to a queue."""
        name = exchange or "amq.direct"
        kind = self._transport.exchanges.get(name, "direct")
        key = checked_name(routing_key or "", "routing key")
        pattern = topic_pattern(key) if kind == "topic" else None
        binding = queues.Binding(checked_name(name, "exchange"), checked_name(queue, "queue"), key, kind, pattern)
        if self.broker.call(lambda s: queues.bind(s, binding)) and kind == "topic":
            # Workers publish no events while nobody listens, as far as they know.
            self.broker.call(consumers.hail)

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """End a binding."""
        self.broker.call(lambda s: queues.unbind(s, exchange or "amq.direct", queue, routing_key or ""))

    def exchange_bind(self, *_: Any, **__: Any) -> None:
        """Not implemented: exchanges cannot be bound to exchanges."""
        raise NotImplementedError("the Postgres broker has no bindings between exchanges")

    exchange_unbind = exchange_bind

    def list_bindings(self) -> list[tuple[str, str, str]]:
        """Return (queue, exchange, routing key) of every binding."""
        return self.broker.call(queues.bindings)

    def queue_purge(self, queue: str, **_: Any) -> int:
        """Remove all messages nobody has leased, and return how many they were."""
        return self.broker.call(lambda s: messages.purge(s, queue))

    def after_reply_message_received(self, queue: str) -> None:
        """Delete a reply queue that has served."""
        self.queue_delete(queue)
