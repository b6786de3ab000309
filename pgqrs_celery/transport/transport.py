"""The kombu transport: ``broker="pgqrs+postgresql://…"``."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

import psycopg
from celery.signals import worker_shutting_down
from kombu.exceptions import ChannelError
from kombu.transport import base

from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.session import Session
from pgqrs_celery.store import broadcasts, consumers, messages, queues
from pgqrs_celery.store.messages import Claimed, Published
from pgqrs_celery.transport import bell
from pgqrs_celery.transport import channel as wrapped
from pgqrs_celery.transport.broker import NOWHERE, Broker, broker_for
from pgqrs_celery.transport.keeper import Keeper
from pgqrs_celery.transport.receiver import Receiver
from pgqrs_celery.transport.wire import Wire, readable
from pgqrs_celery.urls import mask

__all__ = ["Transport"]

logger = logging.getLogger(__name__)

#: Seconds ``drain_events`` waits at most before it looks again.
DRAIN_SLICE: Final = 1.0


class Management(base.Management):
    """What can be asked about the broker."""

    transport: Transport

    def get_bindings(self) -> list[dict[str, str]]:
        """Return every binding."""
        channel: Any = self.transport.client.channel()
        try:
            return [{"destination": q, "source": e, "routing_key": r} for q, e, r in channel.list_bindings()]
        finally:
            channel.close()


class Transport(base.Transport):
    """One kombu connection.

    It has no connection to Postgres of its own until it consumes; publishing goes through the process's pool. A lost
    connection is made again without a word to kombu, so that a worker keeps what it has in hand.
    """

    client: Any
    Channel = wrapped.Channel
    Management = Management

    can_parse_url = True
    default_port = 5432
    driver_type = "postgresql"
    driver_name = "psycopg"
    connection_errors = (*base.Transport.connection_errors, StoreUnavailable, OSError)
    channel_errors = (ChannelError,)

    implements = base.Transport.implements.extend(
        asynchronous=True,
        batch_publish=True,
        exchange_type=frozenset(["direct", "topic", "fanout"]),
        heartbeats=False,
    )

    def __init__(self, client: Any, **_: Any) -> None:
        self.client = client
        self.channels: list[wrapped.Channel] = []
        self.channel_ids = itertools.count(1)
        #: Types of the exchanges declared here, and whether queues are volatile.
        self.exchanges: dict[str, str] = {"": "direct"}
        self.volatile: dict[str, bool] = {}
        self._broker: Broker | None = None
        self._receiver: Receiver | None = None
        self._keeper: Keeper | None = None
        self._hub: Any = None
        self._timer: Any = None

    @property
    def broker(self) -> Broker:
        """The process's broker for this URL."""
        if self._broker is None:
            self._broker = broker_for(self.client)
        return self._broker

    @property
    def receiver(self) -> Receiver:
        """What receives for this connection; started at first use."""
        if self._receiver is None:
            receiver = Receiver(self.broker)
            receiver.refuse = self.give_back
            keeper = Keeper(receiver)
            keeper.start()
            self._receiver, self._keeper = receiver, keeper
            if self._hub is not None:
                self._attach(receiver)
        return self._receiver

    def driver_version(self) -> str:
        """Return psycopg's version."""
        return psycopg.__version__

    def as_uri(self, uri: str | None, include_password: bool = False, mask: str = "**") -> str:
        """Return the URL, without its password unless asked for."""
        if not uri:
            return NOWHERE
        prefix = f"{self.client.uri_prefix}+" if self.client.uri_prefix else ""
        return prefix + (uri if include_password else hide(uri, mask))

    # -- kombu's connection

    def establish_connection(self) -> Transport:
        """Reach the database and check that the schema is there."""
        self.broker.check()
        return self

    def verify_connection(self, connection: Any) -> bool:
        """Return True: lost connections are made again underneath."""
        return True

    def close_connection(self, connection: Any) -> None:
        """Close all channels and the consuming connection."""
        for channel in list(self.channels):
            channel.close()
        self._stop()

    def _collect(self, connection: Any) -> None:
        # kombu drops a connection it takes for broken; messages in hand go back all the same.
        self.close_connection(connection)

    def create_channel(self, connection: Any) -> wrapped.Channel:
        """Return a new channel of ``connection``: a failover may have made it another transport's."""
        channel = wrapped.Channel(connection)
        connection.channels.append(channel)
        return channel

    # -- what channels ask for

    def is_volatile(self, queue: str) -> bool:
        """Return whether the queue lives and dies with a connection."""
        if queue not in self.volatile:
            found = self.broker.call(lambda s: queues.find(s, queue))
            self.volatile[queue] = found is not None and found.volatile
        return self.volatile[queue]

    def consuming(self, channel: wrapped.Channel, left: str | None = None) -> None:
        """Write down what a channel consumes now."""
        receiver = self.receiver
        receiver.changed(channel)
        assert self._keeper is not None
        self._keeper.enter()
        self._keeper.nudge()
        if left is not None:
            self.give_back(receiver.undelivered(channel))
            self._desert([left])
            self._retire()

    def _retire(self) -> None:
        # A web process that has once asked its workers something must not listen for ever.
        receiver = self._receiver
        if receiver is not None and self._hub is None and not receiver.busy:
            self._stop()

    def woken(self, channel: wrapped.Channel) -> None:
        """Take note of a channel's new prefetch."""
        if self._receiver is not None:
            self._receiver.changed(channel)

    def fetch(self, channel: wrapped.Channel, queue: str) -> Claimed | None:
        """Claim one message without a consumer."""
        receiver = self.receiver
        settings = self.broker.settings
        if self.is_volatile(queue):
            taken = self.broker.call(lambda s: broadcasts.take(s, [queue], count=1))
            return next((t.as_claimed() for t in taken if not t.expired), None)
        found = self.broker.call(
            lambda s: messages.claim(
                s, receiver.consumer_id, [queue], count=1, lease=settings.lease, dead=receiver.dead
            )
        )
        for claimed in found:
            receiver.hold(channel, claimed)
            return claimed
        return None

    def acknowledge(self, claimed: Claimed) -> None:
        """Delete a message: soon, with others; at once where the connection is closed already."""
        if self._receiver is not None:
            self._receiver.acknowledge(claimed.message_id)
            self._retire()
        else:
            self.broker.call(lambda s: messages.delete(s, [claimed.message_id]))

    def bury(self, claimed: Claimed, headers: str, reason: str) -> None:
        """Move a leased message to the dead-letter queue; where that fails its lease ends and it comes again."""
        settings, receiver = self.broker.settings, self.receiver
        receiver.take_back([claimed.message_id])
        logger.error(
            "message %s of queue %s goes to the dead-letter queue %s: %s",
            claimed.message_id,
            claimed.queue,
            settings.dead_letter_queue,
            reason,
        )
        self.broker.call(
            lambda s: messages.bury(
                s,
                receiver.consumer_id,
                [(claimed.message_id, headers)],
                queue=settings.dead_letter_queue,
                retention=settings.dead_letter_retention,
            )
        )

    def give_back(self, claimed: Sequence[Claimed]) -> None:
        """End the leases of messages; where the database is away they end by themselves."""
        receiver = self.receiver
        ids = [c.message_id for c in claimed if not self.volatile.get(c.queue)]
        receiver.take_back(ids)
        if not ids:
            return
        try:
            released = self.broker.call(lambda s: messages.release(s, receiver.consumer_id, ids))
            self.broker.wake(_counted(released))
        except StoreUnavailable as error:
            logger.warning("%s; %d messages come back when their leases end", error, len(ids))

    def leave(self, channel: wrapped.Channel, left: Sequence[str], held: Sequence[Claimed]) -> None:
        """End a channel: its consumers, and the leases of what it has not acknowledged."""
        if channel in self.channels:
            self.channels.remove(channel)
        if self._receiver is None:
            return
        receiver = self._receiver
        receiver.changed(channel)
        undelivered = receiver.undelivered(channel)
        if held or undelivered:
            self.give_back([*held, *undelivered])
        if left and self._keeper is not None:
            try:
                self._keeper.enter()
                self._desert(left)
            except StoreUnavailable as error:
                logger.warning("%s; its consumers end with the connection", error)
        self._retire()

    def _desert(self, left: Sequence[str]) -> None:
        consumer_id = self.receiver.consumer_id

        def work(session: Session) -> None:
            remaining = set(self.receiver.queues) | set(self.receiver.volatile)
            ending = [n for n in queues.deserted(session, left, besides=consumer_id) if n not in remaining]
            if ending:
                queues.delete(session, ending)

        self.broker.call(work)

    def _stop(self) -> None:
        receiver, keeper = self._receiver, self._keeper
        self._receiver = self._keeper = None
        if receiver is None or keeper is None:
            return
        receiver.closed = True
        if self._timer is not None:
            self._timer.cancel()
        keeper.stop()
        done, held = receiver.flush(), list(receiver.held)

        def work(session: Session) -> list[str]:
            if done:
                messages.delete(session, done)
            released = messages.release(session, receiver.consumer_id, held) if held else []
            consumers.remove(session, receiver.consumer_id, leasing=receiver.has_leased)
            return released

        try:
            self.broker.wake(_counted(self.broker.call(work)))
        except StoreUnavailable as error:
            logger.warning("%s; %d messages come back when their leases end", error, len(done) + len(held))
        receiver.on_wire(receiver.wire, None)
        if self._hub is not None:
            self._hub.remove_reader(receiver.bell.fileno())
        for wire in (receiver.wire, receiver.fresh):
            if wire is not None:
                wire.close()
        bell.give_back(receiver.bell)

    # -- the event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Receive through this hub from now on."""
        self._hub = loop
        worker_shutting_down.connect(self._on_shutting_down)
        if self._receiver is not None:
            self._attach(self._receiver)

    def unregister_from_event_loop(self, connection: Any, loop: Any) -> None:
        """Receive through ``drain_events`` again."""
        self._hub = None
        worker_shutting_down.disconnect(self._on_shutting_down)
        if self._receiver is not None:
            loop.remove_reader(self._receiver.bell.fileno())
            if self._receiver.wire is not None:
                loop.remove_reader(self._receiver.wire.fileno())

    def _on_shutting_down(self, **_: Any) -> None:
        # Celery notes the signal, and looks when its loop comes round: with nothing to do that may take seconds.
        if self._receiver is not None:
            self._receiver.ring()

    def _attach(self, receiver: Receiver) -> None:
        receiver.on_wire = self._on_wire
        self._hub.add_reader(receiver.bell.fileno(), self._on_bell)
        if receiver.wire is not None:
            self._hub.add_reader(receiver.wire.fileno(), self._on_readable)
        receiver.ring()

    def _on_wire(self, old: Wire | None, new: Wire | None) -> None:
        if self._hub is None:
            return
        if old is not None:
            self._hub.remove_reader(old.fileno())
        if new is not None:
            self._hub.add_reader(new.fileno(), self._on_readable)

    def _on_bell(self) -> None:
        if self._receiver is not None:
            self._receiver.on_bell()
            self._deliver(self._receiver)

    def _on_readable(self) -> None:
        if self._receiver is not None:
            self._receiver.on_readable()
            self._deliver(self._receiver)

    def _deliver(self, receiver: Receiver) -> None:
        receiver.deliver()
        receiver.pump()
        self._schedule()

    def _schedule(self) -> None:
        receiver = self._receiver
        if receiver is None or self._timer is not None:
            return
        left = receiver.pump_in()
        if left is not None:
            self._timer = self._hub.call_later(left, self._pump)

    def _pump(self) -> None:
        self._timer = None
        if self._receiver is not None:
            self._receiver.pump()
            self._schedule()

    def drain_events(self, connection: Any, timeout: float | None = None, **_: Any) -> None:
        """Deliver what arrives within ``timeout`` seconds; raises ``TimeoutError`` where nothing does."""
        receiver = self.receiver
        deadline = None if timeout is None else time.monotonic() + timeout
        receiver.on_bell()
        while not receiver.deliver_some():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("no message within the time given")
            self._wait(receiver, left)

    def _wait(self, receiver: Receiver, left: float | None) -> None:
        waits = [DRAIN_SLICE, *(w for w in (left, receiver.pump_in()) if w is not None)]
        fds = [receiver.bell.fileno()]
        if receiver.wire is not None:
            fds.append(receiver.wire.fileno())
        ready = readable(fds, max(0.0, min(waits)))
        if receiver.wire is not None and receiver.wire.fileno() in ready:
            receiver.on_readable()
        if receiver.bell.fileno() in ready:
            receiver.on_bell()
        else:
            receiver.pump()


def _counted(names: Sequence[str]) -> list[Published]:
    return [Published(name, False, names.count(name), None) for name in dict.fromkeys(names)]


def hide(url: str, replacement: str) -> str:
    """Return the URL with its password replaced."""
    return mask(url).replace("**", replacement)
