"""The lease keeper: extends the leases of what this worker has, and says so when one was lost.

In prefork a body that never lets go of the interpreter does not lose its lease, because the keeper runs in the main
process. With threads, solo, gevent and eventlet it runs beside the bodies, and a body that blocks everything for
longer than the lease loses it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.forks import NoFork
from pgqrs_celery.holdings import Held
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.store import leases, runs, steps, workers

__all__ = ["Keeper", "bereave"]

logger = logging.getLogger(__name__)


def bereave(
    session: Session,
    ledger: Ledger,
    task_id: str,
    *,
    pid: int | None = None,
    generation: int | None = None,
    counted: bool = True,
) -> bool:
    """Make a step of this worker due whose process is gone, and call the relays; False where nothing became due.

    See ``store.steps.bereave`` for what ``pid``, ``generation`` and ``counted`` say.
    """
    worker_id, settings = ledger.worker_id, ledger.settings
    due = worker_id is not None and steps.bereave(
        session,
        task_id,
        worker_id=worker_id,
        max_lost=settings.max_lost,
        poison=ledger.poison,
        counted=counted,
        generation=generation,
        pid=pid,
    )
    runs.notify(session, ledger.channel)
    return due


class Keeper:
    """The thread that renews one worker's leases."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._stop = threading.Event()
        self._no_fork = NoFork()
        self._thread = threading.Thread(target=self._run, name="pgqrs-keeper", daemon=True)
        self._signed_at = float("-inf")
        self._signed: Mapping[str, datetime] = {}
        self._reported: set[str] = set()

    @property
    def interval(self) -> float:
        """Seconds between beats: a lease has three chances, a received message is renewed before it is looked for."""
        settings = self.ledger.settings
        return min(settings.lease / 3, settings.resend_interval / 2)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.interval + self.ledger.settings.connect_timeout)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                with self._no_fork:
                    self.beat()
            except StoreError as error:
                logger.warning("cannot renew leases now: %s", error)

    def beat(self) -> None:
        """Renew everything once. Raises ``StoreError``."""
        worker_id = self.ledger.worker_id
        if worker_id is None:
            return
        held = self._held()
        if held:
            task_ids = {h.task_id for h in held}
            elsewhere = self.ledger.call(
                lambda session: leases.renew(session, task_ids, worker_id=worker_id, lease=self.ledger.settings.lease)
            )
            self._report(elsewhere & {h.task_id for h in held if h.accepted})
        self._sign(worker_id, idle=not held)

    def _held(self) -> list[Held]:
        """Return what this worker has: what it has received, and what its processes have gone on with.

        What one was handed and has not asked for is left out: if it is kept from that, others must have it.
        """
        entries = self.ledger.board.entries() if self.ledger.board else []
        further = [entry.task_id for entry in entries if entry.task_id]
        next_ids = [entry.next_id for entry in entries if entry.next_id]
        if next_ids:
            further += self.ledger.call(lambda session: [n for n in next_ids if _is_running(session, n)])
        return [*self.ledger.holdings.present(), *(Held(task_id, accepted=True) for task_id in further)]

    def _sign(self, worker_id: UUID, *, idle: bool) -> None:
        """Give a sign of life and say what has been received, three times in a lease; half as often when idle."""
        now, marks = time.monotonic(), self.ledger.holdings.watermarks()
        thirds = 2 if idle and marks == self._signed else 1
        if now - self._signed_at < self.ledger.settings.lease * thirds / 3:
            return
        self.ledger.call(lambda session: workers.beat(session, worker_id, marks))
        self._signed_at, self._signed = now, marks

    def _report(self, lost: set[str]) -> None:
        for task_id in sorted(lost - self._reported):
            logger.warning(
                "task %s runs here, but another worker has taken its step over: nothing it does here is recorded",
                task_id,
            )
        self._reported = lost


def _is_running(session: Session, task_id: str) -> bool:
    found = steps.peek(session, task_id)
    return found is not None and found.status == "RUNNING"
