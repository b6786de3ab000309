"""The relay: sends again what is due.

One thread in every worker, no leader. It sleeps on LISTEN until the next due time, claims a bounded batch with
``SKIP LOCKED`` (status and clock change in that statement, so nobody else finds it due), and publishes it. The guard
makes a message that was not needed harmless.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from celery import Celery
from celery.utils.time import maybe_iso8601
from kombu.serialization import prepare_accept_content

from pgqrs_celery import envelope as envelopes
from pgqrs_celery.connecting import broker_errors
from pgqrs_celery.dispatch import ONCE
from pgqrs_celery.envelope import PLAN, SENT, UNDOING, Envelope
from pgqrs_celery.finish import finish, finish_awaited
from pgqrs_celery.housekeeping import Housekeeping
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Session
from pgqrs_celery.store import clock, runs, workers
from pgqrs_celery.store.clock import DueStep

__all__ = ["Relay"]

logger = logging.getLogger(__name__)

#: A row this much older than the newest message its queue has delivered was lost on the way (queues are not
#: strictly in order, and clocks of one database are).
OVERTAKEN: Final = timedelta(seconds=60)

#: At these looks a row is sent again even if its queue is just long: a copy is harmless, silence is not.
BUDGET: Final = frozenset({6, 12, 24, 48, 96, 192})

#: Runs that have had nothing open for so long are closed by the relay.
STUCK_AGE: Final = 2.0
BACKSTOP_INTERVAL: Final = 5.0
#: The same where nothing was received, called for or claimed here since the last look: it is somebody else's work.
BACKSTOP_IDLE: Final = 60.0
#: Open runs looked at each time; the cursor goes round.
BACKSTOP_BATCH: Final = 500


#: A look leaves out what has been due since this long before the last complete one ...
OVERLAP: Final = 5.0
#: ... but one in so many seconds leaves out nothing: what was locked then, or committed late, is found by it.
FULL_LOOK: Final = 10.0


class Horizon:
    """How far back a relay has to look.

    While an old snapshot is open (a dump, a forgotten transaction), every step that was ever due leaves an entry in
    the index that cannot be removed; a look from the beginning of time would wade through all of them.
    """

    def __init__(self) -> None:
        self._last = float("-inf")
        self._last_full = float("-inf")

    def back(self, now: float) -> float | None:
        """Return how many seconds back to look; None for everything."""
        return None if now - self._last_full >= FULL_LOOK else now - self._last + OVERLAP

    def looked(self, began: float, back: float | None) -> None:
        """Note a look that left nothing due."""
        self._last = began
        if back is None:
            self._last_full = began


@dataclass(slots=True)
class Queues:
    """What is known about the queues while one batch of due steps is treated."""

    #: The newest send time that any worker has received.
    marks: Mapping[str, datetime]
    #: Those with messages in them.
    busy: set[str] = field(default_factory=set)


class Relay:
    """Sends what is due, for one app."""

    def __init__(
        self,
        app: Celery,
        ledger: Ledger,
        publish: Callable[[Outgoing, Any], Any],
        revive_chords: Callable[[], None],
    ) -> None:
        self.app = app
        self.ledger = ledger
        self._publish = publish
        self._revive_chords = revive_chords
        self._closed_until = 0.0
        self._failures = 0
        self._backstop_at = float("-inf")
        self._busy_at = time.monotonic()
        self._received: Mapping[str, datetime] = {}
        #: When something is due, as far as is known.
        self._due_at: float | None = None
        self._cursor = 0
        self._horizon = Horizon()
        #: When a queue was last seen empty: what was sent before that and has not been begun is lost, all of it.
        self._emptied: dict[str, datetime] = {}
        self._housekeeping = Housekeeping(ledger)

    def work(self, *, called: bool = True) -> float:
        """Send everything that is due and return for how many seconds nothing will be.

        Where nobody has ``called`` and nothing is known to be due, it only looks whether something is: that is one
        statement, and no write. Raises ``StoreUnavailable``.
        """
        settings, now = self.ledger.settings, time.monotonic()
        pause = self._closed_until - now
        if pause > 0:
            return min(pause, settings.relay_interval)
        if called or (self._due_at is not None and now >= self._due_at):
            self._busy_at = now
            self._send_due()
        self._backstop()
        self._housekeeping.work()
        due = self.ledger.call(
            lambda session: clock.next_due(
                session,
                app=self.ledger.app,
                may_judge=self.ledger.may_judge,
                back=self._horizon.back(time.monotonic()),
            )
        )
        limit = settings.relay_interval * random.uniform(0.75, 1.0)
        self._due_at = None if due is None else time.monotonic() + due
        return limit if due is None else min(limit, max(due, 0.0))

    def _send_due(self) -> None:
        while True:
            claimed, complete = self._claim()
            if claimed:
                self._deliver(claimed)
            if complete or self._closed_until > time.monotonic():
                return

    def _claim(self) -> tuple[list[DueStep], bool]:
        """Take a batch of what is due; the second value says whether that was all."""
        settings, may_judge, began = self.ledger.settings, self.ledger.may_judge, time.monotonic()
        back = self._horizon.back(began)
        claimed = self.ledger.call(
            lambda session: clock.claim_due(
                session,
                app=self.ledger.app,
                may_judge=may_judge,
                batch=settings.relay_batch,
                max_lost=settings.max_lost,
                poison=self.ledger.poison,
                interval=settings.resend_interval,
                interval_max=settings.resend_interval_max,
                back=back,
            )
        )
        complete = len(claimed) < settings.relay_batch
        if complete and may_judge:  # else running steps were left out
            self._horizon.looked(began, back)
        return claimed, complete

    def _deliver(self, claimed: Sequence[DueStep]) -> None:
        """Publish or finish what was claimed; what the broker does not take is due again soon."""
        resent: list[str] = []
        queues = Queues(self._watermarks(claimed))
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            for position, step in enumerate(claimed):
                try:
                    if self._deliver_one(step, producer, queues):
                        resent.append(step.task_id)
                except broker_errors(producer) as error:
                    self._break_circuit(error, claimed[position:])
                    return
                except Exception:
                    logger.exception("step %r (task %s) cannot be sent again now", step.step_id, step.task_id)
            self._failures = 0
        if resent:
            self.ledger.call(lambda session: clock.resent(session, resent))

    def _deliver_one(self, step: DueStep, producer: Any, queues: Queues) -> bool:
        """Treat one claimed step; True where a message that had been sent before was sent again."""
        if step.message is None:
            if step.status == "CANCELLED":  # it waited for a message that nobody will send now
                finish_awaited(self.app, self.ledger, step)
            else:
                logger.error("step %r (task %s) is due, but there is no message to send", step.step_id, step.task_id)
            return False
        if self._is_final(step):
            finish(self.app, self.ledger, step, self._envelope(step))
            return False
        sent_before = step.was == "QUEUED" and step.sent_at is not None
        if sent_before and not self._lost(step, producer, queues):
            return False
        self._send(step, producer)
        if step.was != "QUEUED":
            logger.info("step %r (task %s) was %s and is sent again", step.step_id, step.task_id, step.was)
        return sent_before

    def _is_final(self, step: DueStep) -> bool:
        """Whether a finished step is told by us: cancelled, poisoned just now, or its hand-off was tried too often."""
        if step.status in ("QUEUED", "PAUSED"):
            return False
        poisoned = step.status == "FAILED" and step.lost >= self.ledger.settings.max_lost
        return step.status == "CANCELLED" or poisoned or step.handoffs > self.ledger.settings.max_handoffs

    def _send(self, step: DueStep, producer: Any) -> None:
        envelope = self._envelope(step)
        headers = {**envelope.headers, SENT: step.now.isoformat()}
        if envelope.plan:
            headers[PLAN] = envelope.plan.owner
        if step.undoing:
            headers.update({UNDOING: 1, "expires": None})
        options = dict(envelope.options)
        task: Any = self.app.tasks.get(envelope.name)
        args, kwargs, _ = envelope.body
        options = self.app.amqp.router.route(options, envelope.name, args, kwargs, task)
        remaining = _remaining(headers.get("expires"), step.now)
        if remaining is not None:
            options["expiration"] = remaining
        held = step.sent_at is None and step.was in ("QUEUED", "PAUSED")
        message = Outgoing(
            producer=producer,
            name=envelope.name,
            headers=headers,
            properties=dict(envelope.properties),
            body=(args, kwargs, envelope.body[2]),
            sent_event=self._event(headers, envelope.name) if held else None,
            options={**options, "serializer": envelope.serializer, "retry": True, "retry_policy": ONCE},
        )
        self._publish(message, producer)

    def _event(self, headers: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """Return what a ``task-sent`` event says of a message that was held until now, where the app wants to know."""
        if not self.app.conf.task_send_sent_event:
            return None
        return {
            "uuid": headers["id"],
            "name": name,
            "args": headers.get("argsrepr"),
            "kwargs": headers.get("kwargsrepr"),
            **{key: headers.get(key) for key in ("root_id", "parent_id", "retries", "eta", "expires")},
        }

    def _envelope(self, step: DueStep) -> Envelope:
        assert step.message is not None
        plan = None
        if '"plan": [' in step.message:
            text = self.ledger.call(lambda session: runs.plan(session, step.workflow_id))
            plan = envelopes.load_plan(text, self.ledger.values)
        accept = set(prepare_accept_content(self.app.conf.accept_content) or ())
        return Envelope.load(step.message, accept, plan)

    def _watermarks(self, claimed: Sequence[DueStep]) -> Mapping[str, datetime]:
        if all(step.was != "QUEUED" or step.sent_at is None for step in claimed):
            return {}
        return self.ledger.call(lambda session: workers.watermarks(session, app=self.ledger.app))

    def _lost(self, step: DueStep, producer: Any, queues: Queues) -> bool:
        """Whether a message that was published and not begun is gone: overtaken, its queue empty, or long overdue."""
        assert step.sent_at is not None
        queue = step.queue or ""
        newest, emptied = queues.marks.get(queue), self._emptied.get(queue)
        if newest is not None and step.sent_at < newest - OVERTAKEN:
            return True
        if emptied is not None and step.sent_at < emptied:
            return True
        if step.looks in BUDGET:
            return True
        if not queue or "/" in queue or queue in queues.busy:
            return False
        if self._is_empty(queue, producer):
            self._emptied[queue] = step.now
            return True
        queues.busy.add(queue)
        return False

    def _is_empty(self, queue: str, producer: Any) -> bool:
        # An error may have closed the pooled connection; unlike a publication, a new channel does not open it again.
        producer.connection.ensure_connection(max_retries=1)
        channel = producer.connection.channel()
        try:
            return int(channel.queue_declare(queue, passive=True).message_count) == 0
        except producer.connection.channel_errors:
            return True
        finally:
            with suppress(*producer.connection.channel_errors):
                channel.close()

    def _break_circuit(self, error: BaseException, left: Sequence[DueStep]) -> None:
        """The broker is away: give the rows back to the clock and leave the broker alone for a while."""
        self._failures += 1
        pause = min(30.0, 0.5 * 2.0**self._failures)
        self._closed_until = time.monotonic() + pause
        logger.warning(
            "the broker does not take messages (%r): %d due step(s) wait, next try in %.1f s", error, len(left), pause
        )
        ids = [step.task_id for step in left]
        self.ledger.call(lambda session: clock.unsent(session, ids, interval=pause))

    def _backstop(self) -> None:
        """Close runs whose last worker died between its hand-off and its look, a few at a time."""
        now, received = time.monotonic(), self.ledger.holdings.watermarks()
        if received != self._received or self.ledger.holdings.present():
            self._received, self._busy_at = received, now
        since = now - self._backstop_at
        # Whatever was going on here last, one look comes late enough to find what it has left.
        busy = self._backstop_at < self._busy_at + BACKSTOP_INTERVAL
        if since < (BACKSTOP_INTERVAL if busy else BACKSTOP_IDLE):
            return
        self._backstop_at = now

        def look(session: Session) -> int | None:
            quiet, last = runs.stuck(
                session, app=self.ledger.app, after=self._cursor, age=STUCK_AGE, batch=BACKSTOP_BATCH
            )
            for workflow_id in quiet:
                runs.close_if_quiet(session, workflow_id)
            return last

        self._cursor = self.ledger.call(look) or 0
        self._revive_chords()


def _remaining(expires: Any, now: datetime) -> float | None:
    """Return the seconds until a message expires, as its ``expiration`` property; None where it never does."""
    if not expires:
        return None
    moment = maybe_iso8601(expires)
    assert moment is not None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())
