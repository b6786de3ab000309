"""The receiver: one consuming connection, and when it asks the database for what.

It is driven by an event loop or by ``drain_events``; either way nothing here waits for Postgres. Statements go over a
wire, one at a time; while one is under way, acknowledgements collect, and go with the next.

The rule for claiming: at once while at most half of the prefetch is in flight, else after ``LINGER``, so that short
tasks are claimed and acknowledged in batches and long ones leave no slot empty.

The rule for sleeping: say so (``asleep``), then look once more, then wait to be notified. A publisher commits first
and then looks for a sleeper. Whichever commits last sees the other, so no wake-up is lost; a look by the keeper, every
second or so until the receiver sleeps, is the net below.

The rule for handing out: nothing while the database may take this consumer for asleep. It would be handed messages
while it executes a task in this very thread, and they would wait for its end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID, uuid4

from pgqrs_celery.exceptions import StoreError, StoreUnavailable
from pgqrs_celery.prepared import array
from pgqrs_celery.store.broadcasts import Taken
from pgqrs_celery.store.consumers import wake_up
from pgqrs_celery.store.messages import Claimed, Handed, Published, handed
from pgqrs_celery.transport import bell
from pgqrs_celery.transport.appetite import Appetite, Held, Subscriber
from pgqrs_celery.transport.broker import Broker
from pgqrs_celery.transport.inbox import Inbox
from pgqrs_celery.transport.sleep import Sleep
from pgqrs_celery.transport.wire import Wire, readable

__all__ = ["Receiver"]

logger = logging.getLogger(__name__)

#: Seconds for which acknowledgements, and claims above the low-water mark, wait for company.
LINGER: Final = 0.005
#: Seconds without statements after one that the server refused.
PAUSE: Final = 1.0
#: Seconds for which the statement under way is waited for, by somebody who wants no more messages.
LAST_ANSWER: Final = 5.0
#: The most messages one claim takes.
CLAIM_MAX: Final = 100
#: The most messages of volatile queues one statement takes.
TAKE_MAX: Final = 200


@dataclass(slots=True)
class Underway:
    """The statement under way and what it carries."""

    what: str
    done: list[UUID] = field(default_factory=list)
    appetite: Appetite | None = None
    count: int = 0


class Receiver:
    """Claims, takes, acknowledges and sleeps over one wire."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.consumer_id = uuid4()
        self.bell = bell.lend()
        self.wire: Wire | None = None
        #: A connection made by the keeper, to be taken into use by the thread that drives the receiver.
        self.fresh: Wire | None = None
        self.held: dict[UUID, Held] = {}
        #: Set by the keeper: what it has seen.
        self.dead: list[UUID] = []
        self.shared = True
        self.arrived = True
        self.closed = False
        #: Whether this consumer has ever consumed from queues whose messages are leased.
        self.has_leased = False
        #: Gives back leases that are not wanted.
        self.refuse: Callable[[Sequence[Claimed]], None] = lambda claimed: None
        #: Has the keeper look around now.
        self.nudge: Callable[[], None] = lambda: None
        #: Told the old and the new wire whenever it changes.
        self.on_wire: Callable[[Wire | None, Wire | None], None] = lambda old, new: None
        self._appetites: list[Appetite] = []
        self._done: deque[UUID] = deque()
        self._inbox = Inbox()
        self._underway: Underway | None = None
        self._linger_since: float | None = None
        self.sleep = Sleep()
        self._forward = False
        self._ringing = False
        self._pause_until = 0.0
        self._turn = 0

    @property
    def queues(self) -> list[str]:
        """The queues whose messages are leased, over all subscribers."""
        return list(dict.fromkeys(q for a in self._appetites for q in a.subscriber.queues))

    @property
    def volatile(self) -> list[str]:
        """The queues whose messages are taken for good, over all subscribers."""
        return list(dict.fromkeys(q for a in self._appetites for q in a.subscriber.volatile))

    @property
    def busy(self) -> bool:
        """Whether anybody consumes, or has a message in hand."""
        return bool(self._appetites or self.held or self._inbox)

    def changed(self, subscriber: Subscriber) -> None:
        """Take note of a subscriber's new queues or prefetch."""
        known = next((a for a in self._appetites if a.subscriber is subscriber), None)
        if known is None:
            self._appetites.append(Appetite(subscriber))
        else:
            known.hear()
        if not subscriber.queues and not subscriber.volatile:
            self._appetites = [a for a in self._appetites if a.subscriber is not subscriber]
        queues = self.queues
        self.has_leased = self.has_leased or bool(queues)
        self.bell.listen_for(map(self.broker.address, queues))
        self.arrived = True
        self.ring()

    def ring(self, news: bool = False) -> None:
        """Have the driving thread pump; may be called from any thread."""
        if news or not self._ringing:
            self._ringing = True
            self.bell.ring(news)

    def acknowledge(self, message_id: UUID) -> None:
        """Delete a message with one of the next statements; may be called from any thread, and during an outage."""
        self._done.append(message_id)
        self.held.pop(message_id, None)
        self.ring()

    def hold(self, subscriber: Subscriber, claimed: Claimed) -> None:
        """Keep the lease of a message that was claimed elsewhere."""
        self.held[claimed.message_id] = Held(claimed, subscriber, time.monotonic())

    def undelivered(self, subscriber: Subscriber) -> list[Claimed]:
        """Return, and forget, what has come for queues a subscriber has left, and was not handed out.

        The statement under way is waited for: it may be a claim that brings more of that.
        """
        underway, until = self._underway, time.monotonic() + LAST_ANSWER
        while underway is not None and underway is self._underway and self.wire is not None:
            if not readable([self.wire.fileno()], max(0.0, until - time.monotonic())):
                break
            self.on_readable()
        return self._inbox.withdraw(subscriber)

    def take_back(self, message_ids: Iterable[UUID]) -> None:
        """Forget messages that somebody else has now."""
        for message_id in message_ids:
            self.held.pop(message_id, None)

    def flush(self) -> list[UUID]:
        """Return, and forget, the acknowledgements that have not reached the database."""
        waiting = list(self._done)
        self._done.clear()
        if self._underway is not None:
            waiting += self._underway.done
        return waiting

    def on_bell(self) -> None:
        """Handle a ring: something was published here, acknowledged, changed, or the keeper has news."""
        news = self.bell.hush()
        self._ringing = False  # after the hush: a ring that it swallowed would silence all that follow
        if news:
            self._expect()
        if self.fresh is not None:
            self._exchange()
        self.pump()

    def on_readable(self) -> None:
        """Handle what has arrived on the wire, and send what is due."""
        wire = self.wire
        if wire is None:
            return
        try:
            rows = wire.receive()
        except StoreUnavailable as error:
            self._lose(error)
            return
        except StoreError as error:
            logger.error("the broker's statement failed: %s", error)
            self._restore()
            self._pause_until = time.monotonic() + PAUSE
            rows = None
        if rows is not None:
            self._answer(rows)
        # After the answer: a publisher may have seen us fall asleep by the very statement that is answered here.
        for payload in wire.notifications():
            if payload == "ready":
                self._expect()
            elif payload == "arrived":
                self.arrived = True
            elif (given := handed(payload)) is not None:
                self._take(given)
            else:
                self.nudge()
        self.pump()

    def _expect(self) -> None:
        for appetite in self._appetites:
            appetite.hear()
        if self.shared and all(self._room(a)[0] == 0 for a in self._appetites if a.subscriber.queues):
            self._forward = True

    def _exchange(self) -> None:
        old, self.wire, self.fresh = self.wire, self.fresh, None
        self._restore()
        self.sleep.end()
        self.arrived = True
        for appetite in self._appetites:
            appetite.hear()
        self.on_wire(old, self.wire)
        if old is not None:
            old.close()

    def _lose(self, error: StoreError) -> None:
        old, self.wire = self.wire, None
        self._restore()
        self.sleep.end()
        if not self.closed:
            logger.warning("%s; reconnecting", error)
        self.on_wire(old, None)
        if old is not None:
            old.close()
        self.nudge()

    def _restore(self) -> None:
        if self._underway is not None:
            self._done.extendleft(reversed(self._underway.done))
            self._underway = None

    def _answer(self, rows: list[tuple[Any, ...]]) -> None:
        underway, self._underway = self._underway, None
        if underway is None:
            return
        if underway.what == "messages.claim" and underway.appetite is not None:
            self._claimed(underway, [Claimed(*row) for row in rows])
        elif underway.what == "broadcasts.take":
            self._taken([Taken(*row) for row in rows])
        elif underway.what == "consumers.doze":
            self.sleep.began()
            for appetite in self._appetites:
                appetite.settle(bool(rows[0][0]))

    def _claimed(self, underway: Underway, claimed: list[Claimed]) -> None:
        appetite = underway.appetite
        assert appetite is not None
        appetite.settle(len(claimed) >= underway.count)
        ours = self._in_hand() if claimed else set()
        for message in sorted(claimed, key=lambda m: (-m.priority, m.position)):
            if message.message_id in ours:
                continue  # in hand or just finished, and its lease had run out, or was a former self's
            self._keep(appetite.subscriber, message)

    def _take(self, given: Handed) -> None:
        """Take a message that was leased to us by its publisher, because we slept."""
        message = given.claimed
        self.sleep.found(given.nap)
        if message.message_id in self._in_hand():
            return  # sent again, after a crash of the server that has taken it back from its sender, but not from us
        owner = next((a for a in self._appetites if message.queue in a.subscriber.queues), None)
        if owner is None or self._room(owner)[0] == 0:
            self.refuse([message])
            return
        self._keep(owner.subscriber, message)

    def _in_hand(self) -> set[UUID]:
        """Return the messages that are in hand, or just finished."""
        return {*list(self.held), *list(self._done)}  # lists first, in this order: other threads acknowledge

    def _keep(self, subscriber: Subscriber, claimed: Claimed) -> None:
        self.hold(subscriber, claimed)
        self._inbox.put(subscriber, claimed)

    def _taken(self, taken: list[Taken]) -> None:
        self.arrived = len(taken) > 0
        for message in sorted(taken, key=lambda t: (-t.priority, t.position)):
            owner = next((a.subscriber for a in self._appetites if message.queue in a.subscriber.volatile), None)
            if owner is not None and not message.expired:
                self._inbox.put(owner, message.as_claimed())

    def deliver(self) -> None:
        """Hand out what has arrived. Raises what a callback raises."""
        while self.deliver_some():
            pass

    def deliver_some(self) -> bool:
        """Hand out what has arrived, of volatile queues one message; return whether there was anything.

        Answers come over volatile queues, and who waits for a number of them asks as often.
        """
        if self.sleep.must_rise:
            return False
        delivered = False
        while self._inbox:
            delivered = True
            if self._inbox.deliver_one():
                break
        return delivered

    def pump(self) -> None:
        """Send the next statement, if one is due and none is under way."""
        wire, now = self.wire, time.monotonic()
        if wire is None or self._underway is not None or self.closed or now < self._pause_until:
            return
        try:
            self._send_next(wire, now)
        except StoreUnavailable as error:
            self._lose(error)
        except StoreError as error:
            logger.error("the broker's statement was refused: %s", error)
            self._pause_until = now + PAUSE
            self._restore()

    def _send_next(self, wire: Wire, now: float) -> None:
        if self.sleep.must_rise:
            claimant = next((a for a in self._appetites if a.subscriber.queues), None)
            if claimant is not None:
                self._send_claim(wire, claimant, min(self._room(claimant)[0], CLAIM_MAX))
                return
            self.sleep.must_rise = False
        if self.arrived and (volatile := self.volatile):
            self.arrived = False
            self._send(wire, Underway("broadcasts.take"), {"queues": array(volatile), "count": TAKE_MAX})
            return
        lingered = self._linger_since is not None and now - self._linger_since >= LINGER
        appetite, count = self._next_claim(lingered)
        if appetite is not None or (self._done and lingered):
            self._send_claim(wire, appetite, count)
        elif self._forward:
            self._forward = False
            params = wake_up([Published(q, False, 1, None) for q in self.queues], besides=self.consumer_id)
            if params is not None:
                self._send(wire, Underway("consumers.wake"), params)
        elif not self._inbox and self._should_sleep():  # what has arrived is handed out first
            given = {"consumer_id": self.consumer_id, "queues": array(self.queues), "nap": self.sleep.begin()}
            self._send(wire, Underway("consumers.doze"), given)
        elif self._linger_since is None and (self._done or any(self._open(a) for a in self._appetites)):
            self._linger_since = now

    def _room(self, appetite: Appetite) -> tuple[int, bool]:
        return appetite.subscriber.room(self._inbox.count(appetite.subscriber))

    def _open(self, appetite: Appetite) -> bool:
        return appetite.hungry and bool(appetite.subscriber.queues) and self._room(appetite)[0] > 0

    def _next_claim(self, lingered: bool) -> tuple[Appetite | None, int]:
        for index, appetite in enumerate(self._appetites):
            if not appetite.hungry or not appetite.subscriber.queues:
                continue
            room, low = self._room(appetite)
            if room > 0 and (low or lingered):
                self._appetites.append(self._appetites.pop(index))
                return appetite, min(room, CLAIM_MAX)
        return None, 0

    def _send_claim(self, wire: Wire, appetite: Appetite | None, count: int) -> None:
        done = [self._done.popleft() for _ in range(len(self._done))]
        awake = self.sleep.is_known
        self._linger_since = None
        if appetite is None:
            self._send(wire, Underway("messages.delete", done), {"message_ids": array(done)})
            return
        self._send(
            wire,
            Underway("messages.claim", done, appetite, count),
            {
                "done": array(done),
                "consumer_id": self.consumer_id,
                "awake": awake,
                "queues": array(self._in_turn(appetite.subscriber.queues)),
                "dead": array(self.dead),
                "count": count,
                "lease": self.broker.settings.lease,
            },
        )
        if awake:
            self.sleep.end()

    def _in_turn(self, queues: Sequence[str]) -> list[str]:
        # A claim empties one queue before it looks at the next, so each must come first in its turn.
        self._turn = (self._turn + 1) % max(len(queues), 1)
        return [*queues[self._turn :], *queues[: self._turn]]

    def _send(self, wire: Wire, underway: Underway, params: Mapping[str, Any]) -> None:
        self._underway = underway
        for appetite in self._appetites:
            appetite.news = False
        wire.send(underway.what, params)

    def _should_sleep(self) -> bool:
        waiting = [a for a in self._appetites if a.subscriber.queues]
        return (
            self.sleep.since is None
            and any(not a.hungry and self._room(a)[0] > 0 for a in waiting)
            and not any(self._open(a) for a in waiting)
        )

    def pump_in(self) -> float | None:
        """Return the seconds until a pump is due though nothing happens: something lingers, or a pause ends."""
        if self._underway is not None or self.wire is None:
            return None
        now = time.monotonic()
        if now < self._pause_until:
            return self._pause_until - now
        return None if self._linger_since is None else max(0.0, self._linger_since + LINGER - now)
