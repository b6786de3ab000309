"""A worker's presence: the session whose lock says that it lives, the channel its relay listens on, and its watch.

Every worker watches its next few neighbours in ring order. A lock that is found free on two looks most of a second
apart means that the process is gone, and everything it was executing is due at once. The first such look is as early or
late as ``pgqrs_watch_interval`` has it, the second follows soon: together they cost an idle worker few statements, and
still find a death within two seconds more often than not. After a restart of Postgres all locks are free for a moment,
and their owners need time to come back: a worker that registered before it is judged only when the own session is older
than one lease. Where Postgres was there all the time and only sessions were cut, ``SETTLING`` seconds are enough.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg

from pgqrs_celery.db import notifications, translate
from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.lookout import SETTLING, lookout
from pgqrs_celery.pooler import is_own_session
from pgqrs_celery.session import Session
from pgqrs_celery.store import leases, runs, workers

__all__ = ["Presence"]

logger = logging.getLogger(__name__)

#: Neighbours watched by each worker; more than this many dead in a row are found one group after the other.
NEIGHBOURS: Final = 8

#: Seconds between the two looks that find a lock free. A living worker that has lost its session has a new one sooner.
SECOND_LOOK: Final = 0.75
#: A look may come so much before its time.
EARLY: Final = 0.05

#: Seconds for which the broker's keeper relies on a watch, after the time of its next look.
RELIANCE: Final = 3.0

#: For the session that holds the lock: a host that vanished must not keep it for hours.
KEEPALIVE: Final[dict[str, Any]] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}

POOLED: Final = (
    "the database is reached through a transaction pooler: this worker does not watch others and is not watched, dead "
    "ones are noticed by their leases only, and what is due is looked for every %g s. Set pgqrs_direct_dsn to a DSN "
    "that reaches Postgres itself."
)


class Presence:
    """The session of one worker; used by its relay thread only."""

    def __init__(self, ledger: Ledger, hostname: str) -> None:
        self.ledger = ledger
        self.hostname = hostname
        self._connection: psycopg.Connection[Any] | None = None
        #: When others may be judged whose locks the server has not forgotten.
        self._settled_at = 0.0
        self._suspects: dict[UUID, float] = {}
        #: Incarnations that ended with their session, and whose steps have not all been taken along yet.
        self._formers: list[UUID] = []
        #: Whether the session is this worker's alone, and ends when it does.
        self._own = True

    def open(self) -> None:
        """Begin a new incarnation: lock, registration, LISTEN; takes along what former ones were executing.

        Raises ``StoreUnavailable``.
        """
        ledger, incarnation = self.ledger, self.ledger.incarnation
        assert incarnation is not None
        self.abandon()
        connection = ledger.database.connect(ledger.settings.direct_dsn, **KEEPALIVE)
        session = Session(connection, ledger.database.texts, silence=ledger.database.silence)
        new = uuid4()
        if incarnation.worker_id is not None:
            self._formers.append(incarnation.worker_id)
        try:
            self._own = is_own_session(ledger.database, connection)
            if not self._own:
                logger.warning(POOLED, ledger.settings.relay_interval)
            workers.register(session, new, app=ledger.app, hostname=self.hostname, pid=os.getpid(), locked=self._own)
            connection.execute(f"LISTEN {ledger.channel}".encode())
            incarnation.assume(new)
            for former in self._formers:
                leases.move_owner(session, app=ledger.app, old_id=former, new_id=new)
                workers.stop(session, former)
        except psycopg.Error as error:
            connection.close()
            raise translate(error, ledger.database.schema) from error
        except StoreError:
            connection.close()
            raise
        self._connection = connection
        if self._formers:
            self._settled_at = time.monotonic() + SETTLING
        self._formers.clear()
        self._suspects.clear()

    def abandon(self) -> None:
        """Drop the session without a word; the lock is free when the server notices."""
        lookout.blind(self.ledger.app)
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    @property
    def is_open(self) -> bool:
        """Whether there is a session that has not been found broken."""
        return self._connection is not None and not self._connection.closed

    def wait(self, timeout: float) -> bool:
        """Wait until something may be due; False after so many seconds. Raises ``StoreUnavailable``."""
        assert self._connection is not None
        return bool(notifications(self._connection, timeout))

    def watch(self) -> float:
        """Look at the neighbours, declare dead who is, and return after how many seconds to look again.

        Raises ``StoreUnavailable``.
        """
        ledger, incarnation = self.ledger, self.ledger.incarnation
        assert self._connection is not None
        assert incarnation is not None
        me = incarnation.worker_id
        assert me is not None
        if not self._own:  # a pooler's sessions survive a restart of Postgres that frees everybody's locks
            return ledger.settings.watch_interval
        session = Session(self._connection, ledger.database.texts, silence=ledger.database.silence)
        now = time.monotonic()
        suspects: dict[UUID, float] = {}
        missed = False
        try:
            for neighbour in workers.neighbours(session, me, app=ledger.app, limit=NEIGHBOURS):
                certain = neighbour.certain and now >= self._settled_at
                if not neighbour.free or not (certain or ledger.may_judge):
                    continue
                missed = True
                since = self._suspects.get(neighbour.worker_id, now)
                if now - since >= SECOND_LOOK - EARLY and self._declare_dead(session, neighbour):
                    continue
                suspects[neighbour.worker_id] = since
        except psycopg.Error as error:
            raise translate(error, ledger.database.schema) from error
        if missed:
            lookout.alarm()
        self._suspects = suspects
        pause = SECOND_LOOK if suspects else ledger.settings.watch_interval
        lookout.watching(ledger.app, pause + RELIANCE)
        return pause

    def _declare_dead(self, session: Session, neighbour: workers.Neighbour) -> bool:
        """Make due what a dead worker was executing, while holding its lock; False where it is alive after all."""
        ledger = self.ledger
        with session.connection.transaction():
            session.limit_silence()
            if not workers.try_lock(session, neighbour.lock_key):
                return False
            due = leases.expire(
                session,
                app=ledger.app,
                worker_id=neighbour.worker_id,
                max_lost=ledger.settings.max_lost,
                poison=ledger.poison,
            )
            workers.stop(session, neighbour.worker_id)
            runs.notify(session, ledger.channel)
        logger.warning("worker %s is gone; %d step(s) it was executing are due", neighbour.worker_id, due)
        return True

    def close(self, received: Sequence[str]) -> None:
        """End the incarnation, and with it the lock: everything that was not finished is given back, uncounted.

        ``received`` are the tasks whose messages this worker had, begun or not. Raises ``StoreError``.
        """
        incarnation = self.ledger.incarnation
        worker_id = incarnation.worker_id if incarnation else None
        if worker_id is not None:

            def work(session: Session) -> None:
                leases.release(session, app=self.ledger.app, worker_id=worker_id)
                leases.requeue(session, received)
                workers.stop(session, worker_id)
                runs.notify(session, self.ledger.channel)

            self.ledger.call(work, transaction=True)
        self.abandon()
