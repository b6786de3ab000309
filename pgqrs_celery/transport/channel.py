"""The kombu channel: declares, publishes and consumes in AMQP's terms."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from kombu.transport import base

from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.outbox import Batch, collecting, current
from pgqrs_celery.store.messages import Claimed, NewMessage
from pgqrs_celery.transport import message as wrapped
from pgqrs_celery.transport.amqp import checked_name
from pgqrs_celery.transport.declarations import Declarations
from pgqrs_celery.transport.message import UNCONFIRMED, dump, load, outgoing

if TYPE_CHECKING:
    from pgqrs_celery.transport.transport import Transport

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

#: ``delivery_mode`` of messages that need not survive anything.
TRANSIENT: Final = 1
#: The room of a channel without a prefetch limit.
UNLIMITED: Final = 1_000_000

Callback = Callable[[wrapped.Message], Any]


class Consumer:
    """One ``basic_consume``."""

    __slots__ = ("callback", "no_ack", "queue", "tag", "volatile")

    def __init__(self, tag: str, queue: str, callback: Callback, no_ack: bool, volatile: bool) -> None:
        self.tag = tag
        self.queue = queue
        self.callback = callback
        self.no_ack = no_ack
        self.volatile = volatile


class PublishBatch:
    """Collects the messages of a ``Producer.batch()``; one statement inserts up to ``max_size`` of them."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
        self._batch = Batch(max_size)

    def publish(self, message: dict[str, Any], **kwargs: Any) -> None:
        """Take one message; an open collector takes it instead."""
        with collecting(current() or self._batch):
            self.channel.basic_publish(message, **kwargs)

    def flush(self) -> None:
        """Insert what was collected; may be called again after an error, without duplicates."""
        self._batch.flush()

    def discard(self) -> None:
        """Forget what was collected."""
        self._batch.discard()

    def close(self) -> None:
        """End the batch."""
        self._batch.discard()


class Channel(Declarations, base.StdChannel):
    """A channel of a connection; acknowledgements outlive it."""

    Message = wrapped.Message

    def __init__(self, transport: Transport) -> None:
        self.connection: Transport | None = transport
        self.broker = transport.broker
        self.channel_id = next(transport.channel_ids)
        self.closed = False
        self.prefetch_count = 0
        self.events: dict[str, set[Any]] = defaultdict(set)
        self._transport = transport
        self._consumers: dict[str, Consumer] = {}
        self._held: dict[str, Claimed] = {}

    # -- publishing

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the message in the form ``basic_publish`` takes."""
        properties = properties if properties is not None else {}
        properties.setdefault("priority", priority or 0)
        return {
            "body": body,
            "content-type": content_type,
            "content-encoding": content_encoding,
            "headers": headers if headers is not None else {},
            "properties": properties,
        }

    def basic_publish(self, message: dict[str, Any], exchange: str = "", routing_key: str = "", **_: Any) -> None:
        """Publish a message: at once, or into the collector that is open here."""
        new = self._outgoing(message, exchange or "", routing_key or "")
        if new is None:
            return
        try:
            self.broker.publish([new])
        except StoreUnavailable:
            # Whether it was committed is not known; a second attempt with the same id can do no harm.
            message["headers"][UNCONFIRMED] = (hash(message["body"]), new.message_id)
            raise
        message["headers"].pop(UNCONFIRMED, None)

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """Return what ``Producer.batch()`` collects messages in."""
        return PublishBatch(self, max_size)

    def _outgoing(self, message: dict[str, Any], exchange: str, routing_key: str) -> NewMessage | None:
        bound = self.broker.bound_exchanges
        if bound is not None and exchange and exchange not in bound and self._is_event(message, exchange):
            return None  # nobody listens: an idle worker's heartbeats need no statement
        checked_name(routing_key, "queue" if not exchange else "routing key")
        return outgoing(message, exchange, routing_key)

    def _is_event(self, message: dict[str, Any], exchange: str) -> bool:
        return (
            self._transport.exchanges.get(exchange) == "topic"
            and message["properties"].get("delivery_mode") == TRANSIENT
            and "hostname" in message["headers"]
        )

    # -- consuming

    def basic_consume(
        self, queue: str, no_ack: bool = False, callback: Callback | None = None, consumer_tag: str = "", **_: Any
    ) -> str:
        """Consume from a queue."""
        assert callback is not None
        tag = consumer_tag or str(uuid4())
        self._consumers[tag] = Consumer(tag, queue, callback, no_ack, self._transport.is_volatile(queue))
        self._transport.consuming(self)
        return tag

    def basic_cancel(self, consumer_tag: str, **_: Any) -> None:
        """Stop consuming; messages that were delivered stay with the consumer."""
        consumer = self._consumers.pop(consumer_tag, None)
        if consumer is not None and self.connection is not None:
            self._transport.consuming(self, left=consumer.queue)

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> wrapped.Message | None:
        """Return one message, or None where there is none."""
        claimed = self._transport.fetch(self, queue)
        return None if claimed is None else self._receive(claimed, no_ack, "")

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Set how many messages may be delivered and unacknowledged; 0 means without limit."""
        self.prefetch_count = prefetch_count or 0
        if self._consumers:
            self._transport.woken(self)

    @property
    def qos(self) -> Channel:
        """The channel itself answers for its prefetch."""
        return self

    def can_consume(self) -> bool:
        """Return whether another message may come."""
        return self.room()[0] > 0

    @property
    def queues(self) -> Sequence[str]:
        """The queues whose messages are leased."""
        return [c.queue for c in self._consumers.values() if not c.volatile]

    @property
    def volatile(self) -> Sequence[str]:
        """The queues whose messages are taken for good."""
        return [c.queue for c in self._consumers.values() if c.volatile]

    def room(self, arrived: int = 0) -> tuple[int, bool]:
        """Return how many more messages may come, and whether at most half of the prefetch is in flight."""
        if not self.prefetch_count:
            return UNLIMITED, True
        in_flight = len(self._held) + arrived
        return max(0, self.prefetch_count - in_flight), in_flight * 2 <= self.prefetch_count

    def deliver(self, claimed: Claimed) -> None:
        """Hand a message to its consumer."""
        consumer = next((c for c in list(self._consumers.values()) if c.queue == claimed.queue), None)
        if consumer is None:
            self._give_back([claimed], consumer)
            return
        if not consumer.volatile and claimed.lost >= self.broker.settings.delivery_limit:
            self._bury(claimed, f"{claimed.lost} consumers died with it")
            return
        message = self._receive(claimed, consumer.no_ack, consumer.tag)
        if message is not None:
            consumer.callback(message)

    def _receive(self, claimed: Claimed, no_ack: bool, tag: str) -> wrapped.Message | None:
        delivery_tag = str(claimed.message_id)
        try:
            message = wrapped.Message(
                self,
                delivery_tag,
                claimed.headers,
                claimed.properties,
                claimed.body,
                redelivered=claimed.deliveries > 1,
                consumer_tag=tag,
                queue=claimed.queue,
            )
        except (ValueError, TypeError, AttributeError) as error:
            logger.error("message %s of queue %s cannot be read: %r", delivery_tag, claimed.queue, error)
            self._bury(claimed, repr(error))
            return None
        if no_ack:
            self._finish(claimed)
        else:
            self._held[delivery_tag] = claimed
        return message

    def _finish(self, claimed: Claimed) -> None:
        if not self._transport.volatile.get(claimed.queue):
            self._transport.acknowledge(claimed)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge a message, and with ``multiple`` all that were delivered before it."""
        tags = [delivery_tag]
        if multiple:
            delivered = list(self._held)
            tags = delivered[: delivered.index(delivery_tag) + 1] if delivery_tag in self._held else tags
        for tag in tags:
            claimed = self._held.pop(tag, None)
            if claimed is not None:
                self._finish(claimed)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or give it back to its queue at its old place."""
        claimed = self._held.pop(delivery_tag, None)
        if claimed is None:
            return
        if requeue:
            self._give_back([claimed])
        else:
            self._finish(claimed)

    def basic_recover(self, requeue: bool = False) -> None:
        """Give back everything that was delivered and not acknowledged."""
        if not requeue:
            raise NotImplementedError("the Postgres broker recovers messages by requeueing them")
        held, self._held = list(self._held.values()), {}
        self._give_back(held)

    def bury(self, delivery_tag: str, reason: str) -> None:
        """Move a message to the dead-letter queue."""
        claimed = self._held.pop(delivery_tag, None)
        if claimed is not None:
            self._bury(claimed, reason)

    def _bury(self, claimed: Claimed, reason: str) -> None:
        try:
            headers = load(claimed.headers)
        except ValueError:
            headers = {}
        headers = headers if isinstance(headers, dict) else {}
        death = {"queue": claimed.queue, "reason": reason, "count": claimed.deliveries}
        headers["x-death"] = [death, *headers.get("x-death", [])]
        self._transport.bury(claimed, dump(headers), reason)

    def _give_back(self, claimed: Sequence[Claimed], consumer: Consumer | None = None) -> None:
        self._transport.give_back(claimed)

    def message_to_python(self, message: Any) -> wrapped.Message:
        """Return the message as it is: it was made when it arrived."""
        return message  # type: ignore[no-any-return]

    def flow(self, active: bool = True) -> None:
        """Not implemented: set the prefetch count instead."""
        raise NotImplementedError("the Postgres broker has no flow control; use basic_qos")

    def close(self) -> None:
        """Cancel all consumers and give back what was not acknowledged."""
        if self.closed:
            return
        self.closed = True
        left = [c.queue for c in self._consumers.values()]
        self._consumers.clear()
        held, self._held = list(self._held.values()), {}
        self._transport.leave(self, left, held)
        self.connection = None
