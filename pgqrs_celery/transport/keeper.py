"""The keeper: the thread beside a receiver that keeps leases, moves due ETAs, watches neighbours, and reconnects.

It works while the main thread is busy (a task in the solo pool, a long callback), and it is the net under every
notification: it looks around once in ``LOOK_INTERVAL`` seconds.

It rests (a look in ``LONGEST_LOOK`` seconds) while the receiver is asleep and all who could be missed are workers that
this process's presence watches. Whatever a look would find then has somebody who tells: a publisher of a message or of
a near ETA, a new consumer, a new binding of a topic exchange, a presence that misses a worker, whoever has found a
consumer dead. A look made after the receiver fell asleep comes first: publishers who had not seen it asleep are before.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from typing import Final
from uuid import UUID, uuid4

from pgqrs_celery.exceptions import StoreError, StoreUnavailable
from pgqrs_celery.forks import NoFork
from pgqrs_celery.lookout import SETTLING, lookout
from pgqrs_celery.pooler import is_own_session
from pgqrs_celery.session import Session
from pgqrs_celery.store import consumers, messages, queues
from pgqrs_celery.store.consumers import Sight
from pgqrs_celery.store.messages import LONGEST_LOOK, LOOK_INTERVAL, Published
from pgqrs_celery.transport.receiver import Receiver
from pgqrs_celery.transport.wire import Wire

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

#: Seconds for which a neighbour's lock must have been free: one that has only lost its connection has a new one sooner.
SUSPICION: Final = 1.0
#: Seconds between two looks that others call for, however often they call: each look answers all calls before it.
NUDGE_GAP: Final = 0.1
#: Seconds between two rounds of clearing away what has expired.
SWEEP_INTERVAL: Final = 20.0
#: Expired messages that one sweep removes at most.
SWEEP_BATCH: Final = 1000
#: Session settings of a wire. A claim must walk its index in order, whatever the statistics said when it was planned;
#: a claim or an acknowledgement lost in a crash of the server only means that a message comes again.
WIRE_SETTINGS: Final = (
    "SET enable_seqscan = off",
    "SET enable_bitmapscan = off",
    "SET enable_sort = off",
    "SET jit = off",
    "SET synchronous_commit = off",
)

POOLED: Final = (
    "the broker connection goes through a transaction pooler, which passes no notifications on: looking for messages "
    "every %g s, and noticing dead workers by their leases only. Set pgqrs_direct_dsn (the transport option direct_dsn "
    "or listen_dsn) to a DSN that reaches Postgres itself."
)


class Keeper:
    """Cares for one receiver."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._broker = receiver.broker
        self._stop = threading.Event()
        self._nudged = threading.Event()
        #: Consumers whose locks were free, and since when.
        self._suspects: dict[UUID, float] = {}
        #: How often somebody was missed, and how many of these alarms a wide look has answered.
        self._alarms = 0
        self._answered = 0
        self._watched = False
        self._looked_at = 0.0
        #: When the database was last told that the consumer lives; it is entered presently.
        self._touched_at = time.monotonic()
        self._due_at: float | None = None
        self._session_since = time.monotonic()
        #: When neighbours may be judged whose locks the server has not forgotten.
        self._settled_at = 0.0
        self._next_look = 0.0
        self._next_sweep = time.monotonic() + random.uniform(0, SWEEP_INTERVAL)
        self._attempts = 0
        #: Consumers this one tried to become since it was cut off.
        self._attempted: list[UUID] = []
        self._locked = True
        self._told = ""
        self._no_fork = NoFork()
        self._thread: threading.Thread | None = None
        receiver.nudge = self.nudge

    def start(self) -> None:
        """Connect, enter the consumer and start the thread; raises ``StoreUnavailable`` where nobody answers."""
        self._receiver.fresh = self._connect(self._receiver.consumer_id)
        self.enter()
        if not self._receiver.queues:
            self._next_look = time.monotonic() + LOOK_INTERVAL
        self._thread = threading.Thread(target=self._run, name="pgqrs-keeper", daemon=True)
        self._thread.start()
        lookout.listen(self.alarm)
        self._receiver.ring()

    def stop(self) -> None:
        """End the thread."""
        lookout.leave(self.alarm)
        self._stop.set()
        self._nudged.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def nudge(self) -> None:
        """Look around now; may be called from any thread."""
        self._next_look = 0.0
        self._nudged.set()

    def alarm(self) -> None:
        """A worker is missed: look for consumers that went with it; may be called from any thread."""
        self._alarms += 1
        if not self._suspects:  # else the look that decides about them is due soon, and must not come too soon
            self.nudge()

    def enter(self) -> None:
        """Write down what the receiver consumes."""
        self._broker.call(lambda session: self._register(session, self._receiver.consumer_id, []))

    def _register(self, session: Session, consumer_id: UUID, formers: list[UUID]) -> None:
        consumers.register(
            session,
            consumer_id,
            queues=[*self._receiver.queues, *self._receiver.volatile],
            hostname=socket.gethostname(),
            pid=os.getpid(),
            locked=self._locked,
            lease=self._broker.settings.lease,
            formers=formers,
        )

    def _connect(self, consumer_id: UUID) -> Wire:
        broker = self._broker
        connection = broker.connect()
        try:
            with broker.borrowed(connection) as session:
                self._locked = is_own_session(broker.database, connection)
                if not self._locked:
                    logger.warning(POOLED, broker.settings.poll_interval)
                else:
                    for setting in WIRE_SETTINGS:
                        connection.execute(setting)
                    consumers.lock(session, consumer_id)
                    connection.execute(f'LISTEN "{consumers.channel(consumer_id)}"')
        except StoreError:
            connection.close()
            raise
        self._session_since = time.monotonic()
        prepare = broker.settings.prepared_statements and self._locked
        return Wire(connection, broker.database.texts, broker.settings.schema, prepare=prepare)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._nudged.wait(max(0.0, self._next_look - time.monotonic())) and self._receiver.wire is not None:
                self._stop.wait(max(0.0, self._looked_at + NUDGE_GAP - time.monotonic()))
            nudged = self._nudged.is_set()
            self._nudged.clear()
            if self._stop.is_set():
                return
            if not nudged and (rest := self._rest()) > 0:
                self._next_look = time.monotonic() + min(rest, LOOK_INTERVAL)
                continue
            try:
                with self._no_fork:
                    self._round()
            except StoreUnavailable as error:
                self._attempts += 1
                pause = min(2.0, 0.05 * 2**self._attempts) * random.uniform(0.5, 1.0)
                self._next_look = time.monotonic() + pause
                if self._attempts == 2:
                    logger.warning("%s; messages in hand are kept, trying again", error)
            except StoreError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    logger.error("the broker's keeper failed, and goes on trying: %s", error)
                self._next_look = time.monotonic() + LOOK_INTERVAL

    def _rest(self) -> float:
        """Return for how many seconds no look is needed, as things stand; 0 where one is."""
        receiver = self._receiver
        asleep_since = receiver.sleep.since
        if asleep_since is None or asleep_since >= self._looked_at or receiver.held or receiver.wire is None:
            return 0.0
        missed = self._alarms > self._answered or self._suspects
        if missed or not (self._locked and self._watched and lookout.watched()):
            return 0.0
        until = self._looked_at + min(LONGEST_LOOK, self._broker.settings.lease / 3)
        return max(0.0, (until if self._due_at is None else min(until, self._due_at)) - time.monotonic())

    def _round(self) -> None:
        receiver = self._receiver
        if receiver.wire is None and receiver.fresh is None:
            self._reconnect()
        self._extend()
        due_in = self._look()
        if time.monotonic() >= self._next_sweep:
            self._sweep()
        if self._attempts > 1:
            logger.warning("the database answers again")
        self._attempts = 0
        settings = self._broker.settings
        interval = min(LOOK_INTERVAL if self._locked else settings.poll_interval, settings.lease / 3)
        self._next_look = time.monotonic() + min(interval, due_in if due_in is not None else interval)

    def _reconnect(self) -> None:
        """Come back as a new consumer that has what this one and all it tried to become had.

        An attempt may be cut short anywhere, after its COMMIT as well; until one has come through, the leases may
        be any of theirs.
        """
        receiver = self._receiver
        consumer_id, formers = uuid4(), [receiver.consumer_id, *self._attempted]
        wire = self._connect(consumer_id)
        try:
            held = list(receiver.held)
            mine = self._take_over(consumer_id, formers, held)
        except BaseException:
            self._attempted.append(consumer_id)
            wire.close()
            raise
        self._attempted.clear()
        self._settled_at = time.monotonic() + SETTLING
        receiver.consumer_id = consumer_id
        self._note_lost(set(held) - mine)
        receiver.dead = [*receiver.dead, *formers]
        receiver.fresh = wire
        receiver.ring()

    def _take_over(self, consumer_id: UUID, formers: list[UUID], held: list[UUID]) -> set[UUID]:
        lease = self._broker.settings.lease

        def work(session: Session) -> set[UUID]:
            # In one transaction: as soon as the formers are dead, others take what they had.
            mine = messages.adopt(session, consumer_id, [*formers, consumer_id], held, lease=lease) if held else set()
            self._register(session, consumer_id, formers)
            return mine

        return self._broker.call(work, transaction=True)

    def _extend(self) -> None:
        receiver, lease = self._receiver, self._broker.settings.lease
        now = time.monotonic()
        aged = [message_id for message_id, held in list(receiver.held.items()) if now - held.since > lease / 3]
        if not aged:
            return
        mine = self._broker.call(lambda s: messages.extend(s, receiver.consumer_id, aged, lease=lease))
        for message_id in mine:
            held = receiver.held.get(message_id)
            if held is not None:
                held.since = now
        self._note_lost(set(aged) - mine)

    def _note_lost(self, message_ids: set[UUID]) -> None:
        gone = [m for m in message_ids if m in self._receiver.held]
        self._receiver.take_back(gone)
        if gone:
            logger.info("%d messages in hand are not ours any more: finished elsewhere, or leased anew", len(gone))

    def _look(self) -> float | None:
        receiver = self._receiver
        names = receiver.queues
        lease = self._broker.settings.lease
        self._looked_at = began = time.monotonic()
        self._watched, alarms = False, self._alarms
        judge = self._locked and began - self._session_since > lease
        settled = self._locked and began >= self._settled_at
        if began - self._touched_at >= lease / 3:
            self._broker.call(lambda session: consumers.touch(session, receiver.consumer_id))
            self._touched_at = began
        sight: Sight = self._broker.call(
            lambda session: consumers.watch(
                session,
                receiver.consumer_id,
                queues=names,
                volatile=receiver.volatile,
                suspects=[one for one, since in self._suspects.items() if began - since >= SUSPICION],
                judge=judge,
                settled=settled,
                wide=alarms > self._answered or bool(self._suspects),
                watched_apps=lookout.watched(),
            )
        )
        if not sight.registered:
            self._lost_registration()
        self._suspects = {one: self._suspects.get(one, began) for one in sight.suspects}
        if judge or settled:
            self._answered = alarms
        self._watched = sight.watched
        self._due_at = None if sight.due_in is None else time.monotonic() + sight.due_in
        fresh_dead = set(sight.dead) - set(receiver.dead)
        receiver.dead = sight.dead
        receiver.shared = sight.shared
        self._broker.bound_exchanges = frozenset(sight.bound)
        if sight.arrived:
            receiver.arrived = True
        if sight.ready or fresh_dead:
            receiver.ring(news=True)
        elif sight.arrived:
            receiver.ring()
        if sight.due_in is not None and sight.due_in <= 0:
            self._promote(names)
            return 0.0
        return sight.due_in

    def _lost_registration(self) -> None:
        # Somebody took us for dead, or the server crashed and forgot its unlogged tables: come back as somebody else.
        logger.warning("this consumer is not registered any more; registering anew")
        self._reconnect()

    def _promote(self, names: list[str]) -> None:
        promoted = self._broker.call(lambda s: messages.promote(s, names))
        counts: dict[str, int] = {}
        for queue in promoted:
            counts[queue] = counts.get(queue, 0) + 1
        self._receiver.ring(news=True)
        self._broker.wake([Published(queue, False, count, None) for queue, count in counts.items()])

    def _sweep(self) -> None:
        self._next_sweep = time.monotonic() + SWEEP_INTERVAL * random.uniform(0.8, 1.2)
        receiver, lease = self._receiver, self._broker.settings.lease

        def work(session: Session) -> bool:
            swept = queues.sweep(session, [*receiver.queues, *receiver.volatile], lease=lease)
            if swept.deserted:
                queues.delete(session, swept.deserted)
            return swept.expired >= SWEEP_BATCH

        while self._broker.call(work) and not self._stop.is_set():
            pass
