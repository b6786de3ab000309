"""Dispatch: what the ledger has accepted is published, with its record or after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeAlias

from celery import Celery, states
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from pgqrs_celery import outbox
from pgqrs_celery.circumstances import Box
from pgqrs_celery.connecting import broker_errors
from pgqrs_celery.durability import signature_ids
from pgqrs_celery.envelope import SENT
from pgqrs_celery.exceptions import StoreError, StoreUnavailable
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.posting import Poster
from pgqrs_celery.session import Session
from pgqrs_celery.store import clock
from pgqrs_celery.store import messages as sent
from pgqrs_celery.store.messages import NewMessage, Published
from pgqrs_celery.store.recording import Outcome, Recorded
from pgqrs_celery.transport.broker import Broker

__all__ = ["ONCE", "TOGETHER", "Dispatcher"]

logger = logging.getLogger(__name__)

#: Messages published to our own broker with one statement.
TOGETHER: Final = 1000

#: Celery's publish retry, cut down to what a stale pooled connection needs: the relay does the rest.
ONCE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


Publication: TypeAlias = tuple[Any, dict[str, Any]]


class Mute:
    """Stands for a kombu producer while Celery's sender publishes a message that is not sent; keeps its event."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: list[Publication] = []

    def publish(self, body: Any, **options: Any) -> None:
        """Take a publication."""
        self._kept.append((body, options))

    @property
    def events(self) -> list[Publication]:
        """What was published after the message."""
        return self._kept[1:]


class Dispatcher:
    """Publishes recorded messages: as rows of our own broker, many at a time, or to another one by one."""

    def __init__(self, app: Celery, ledger: Callable[[], Ledger]) -> None:
        self.app = app
        self._ledger = ledger
        #: Publishes one message past the seam.
        self.publish: Callable[..., Any]
        #: Returns the broker where it is ours, so that many messages can be published with one statement.
        self.broker: Callable[[], Broker | None]
        #: Returns this thread's producer for our own broker, None where the broker is another.
        self.own_producer: Callable[[], Any]

    def collect(self, outgoing: Sequence[Outgoing], recorded: Mapping[str, Recorded]) -> list[NewMessage]:
        """Return the accepted messages as rows of our own broker, for the transaction that records them.

        Raises ``StoreUnavailable``: a producer that is used for the first time connects, and declares its queue.
        """
        accepted, producer = [], self.own_producer()
        for message in outgoing:
            entry = recorded[message.task_id]
            if entry.outcome is Outcome.SEND and not message.held:
                message.producer = producer
                message.headers[SENT] = entry.sent_at.isoformat()
                accepted.append(message)
        return self.rows(accepted)

    def rows(self, outgoing: Iterable[Outgoing]) -> list[NewMessage]:
        """Return messages as rows of our own broker.

        Raises ``StoreUnavailable``: a producer that is used for the first time connects, and declares its queue.
        """
        box, broker = Box(), self.broker()
        assert broker is not None
        try:
            with outbox.collecting(box):
                for message in outgoing:
                    message.options["retry"] = False  # nothing is sent yet
                    self.publish(message, Poster(broker, message.producer, box.messages.append, message))
        except OperationalError as error:
            if isinstance(error.__cause__, StoreUnavailable):
                raise error.__cause__ from None
            raise
        return box.messages

    def tell(self, message: Outgoing, sent_at: datetime) -> Callable[[], None]:
        """Tell everybody who hears of messages of one that its sender goes on with, as if it were published.

        Returns what publishes its ``task-sent`` event.
        """
        message.headers[SENT] = sent_at.isoformat()
        message.options["retry"] = False
        mute = Mute()
        self.publish(message, mute)
        return partial(self._publish_events, mute.events)

    def _publish_events(self, events: Sequence[Publication]) -> None:
        if not events:
            return
        with self.app.producer_or_acquire() as producer:
            away: tuple[type[BaseException], ...] = (StoreError, *broker_errors(producer))
            try:
                for body, options in events:
                    producer.publish(body, **{**options, "retry": True, "retry_policy": ONCE})
            except away as error:
                logger.warning("the broker does not take a task-sent event: %r", error)

    def report(self, events: Sequence[NewMessage]) -> None:
        """Publish the ``task-sent`` events that rows brought with them; what they tell of has happened, sent or not."""
        broker = self.broker()
        if not events or broker is None:
            return
        try:
            broker.publish(events)
        except StoreUnavailable as error:
            logger.warning("the broker does not take a task-sent event: %s", error)

    def publish_within(
        self, session: Session, outgoing: Sequence[Outgoing], recorded: Mapping[str, Recorded]
    ) -> Iterator[Published]:
        """Publish what was accepted to our own broker, in the transaction that records it."""
        for start in range(0, len(outgoing), TOGETHER):
            collected = self.collect(outgoing[start : start + TOGETHER], recorded)
            if collected:
                yield from sent.publish(session, collected)

    def send(self, messages: Sequence[Outgoing], recorded: Mapping[str, Recorded]) -> None:
        """Publish what was accepted, now that its record is committed; relays send what the broker does not take."""
        waiting = []
        for message in messages:
            entry = recorded[message.task_id]
            if entry.outcome is Outcome.CANCELLED:
                self._announce_cancelled(message)
            elif entry.outcome is Outcome.SEND and not message.held:
                message.headers[SENT] = entry.sent_at.isoformat()
                waiting.append(message)
        broker = self.broker()
        if broker is not None:
            self._send_together(broker, waiting)
            return
        for position, message in enumerate(waiting):
            message.options.update(retry=True, retry_policy=ONCE)
            try:
                self.publish(message)
            except broker_errors(message.producer) as error:
                self._not_taken(waiting[position:], error)
                return

    def _send_together(self, broker: Broker, waiting: Sequence[Outgoing]) -> None:
        """Publish to our own broker, many messages with one statement."""
        for start in range(0, len(waiting), TOGETHER):
            try:
                broker.publish(self.rows(waiting[start : start + TOGETHER]))
            except StoreUnavailable as error:
                self._not_taken(waiting[start:], error)
                return

    def _not_taken(self, left: Sequence[Outgoing], error: BaseException) -> None:
        """The broker is away: what is recorded is sent by a relay."""
        logger.warning(
            "the broker does not take messages (%r): %d recorded task(s), first %s[%s], are sent by a worker's relay "
            "when it does again",
            error,
            len(left),
            left[0].name,
            left[0].task_id,
        )
        task_ids = [message.task_id for message in left]
        self._ledger().call(lambda session: clock.unsent(session, task_ids, interval=1.0))

    def _announce_cancelled(self, message: Outgoing) -> None:
        """Store REVOKED for a message of a cancelled run and for everything that would have followed it."""
        reason = TaskRevokedError("the run was cancelled")
        followers = {task_id for link in message.chain or () for task_id in signature_ids(link)}
        for task_id in (message.task_id, *sorted(followers)):
            self.app.backend.store_result(task_id, reason, states.REVOKED)

    def announce_refused(self, outgoing: Sequence[Outgoing], recorded: Mapping[str, Recorded]) -> None:
        """Store REVOKED for what was not accepted because its run is cancelled."""
        for message in outgoing:
            if recorded[message.task_id].outcome is Outcome.CANCELLED:
                self._announce_cancelled(message)
