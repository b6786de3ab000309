"""The scheduler: a thread in every worker that starts what is due; which worker does it is all the same.

The run, whose key is the schedule's name and the time, and the schedule's next time are one transaction: a worker that
dies in it has done nothing, and no two workers start the same run.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from celery import bootsteps

from pgqrs_celery.compat.underway_cron import Cron
from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.forks import NoFork
from pgqrs_celery.store import schedules

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs
    from pgqrs_celery.compat.underway_workflow import BuiltWorkflow

__all__ = ["SchedulerStep", "known_workflows", "tick"]

logger = logging.getLogger(__name__)

#: The longest time without a look: schedules that other processes enter are seen that late at most, in seconds.
LONGEST_PAUSE: Final = 2.0


_known: WeakKeyDictionary[Pgqrs, dict[str, BuiltWorkflow]] = WeakKeyDictionary()


def known_workflows(pgqrs: Pgqrs) -> dict[str, BuiltWorkflow]:
    """Return the workflows built on an app, by name."""
    return _known.setdefault(pgqrs, {})


def tick(pgqrs: Pgqrs) -> int | None:
    """Start one run that is due; returns its id, 0 where a time was passed over, None where nothing was due."""
    ledger, known = pgqrs.ledger, known_workflows(pgqrs)
    with ledger.database.transaction() as session:
        due = schedules.claim(session, app=ledger.app, workflows=list(known))
        if due is None:
            return None
        cron = Cron(due.cron, due.zone)
        fired_at = due.next_fire_at
        following = cron.after(fired_at if due.catch_up else due.now)
        run_id = None
        if due.overlap or not due.busy:
            key = f"{due.name}/{fired_at.isoformat()}"
            run_id = known[due.workflow].start_in(session.connection, ledger.values.load(due.args), key).id
        schedules.advance(session, app=ledger.app, name=due.name, fired_at=fired_at, next_fire_at=following, run=run_id)
    logger.info("schedule %r of %s: run %s", due.name, fired_at, run_id or "passed over, the last one has not ended")
    return run_id or 0


class SchedulerStep(bootsteps.StartStopStep):
    """The worker bootstep."""

    requires = ("celery.worker.components:Pool",)
    label = "pgqrs-scheduler"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = threading.Event()
        self._no_fork = NoFork()
        self._thread: threading.Thread | None = None

    def start(self, parent: Any) -> None:
        """Start the thread."""
        pgqrs = parent.app.pgqrs
        self._thread = threading.Thread(target=self._run, args=(pgqrs,), name="pgqrs-scheduler", daemon=True)
        self._thread.start()

    def stop(self, parent: Any) -> None:
        """Stop the thread and wait for the run it may be starting."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    terminate = stop

    def _run(self, pgqrs: Pgqrs) -> None:
        while not self._stop.is_set():
            pause: float | None = LONGEST_PAUSE
            try:
                with self._no_fork:
                    while tick(pgqrs) is not None and not self._stop.is_set():
                        pass
                    app, names = pgqrs.ledger.app, list(known_workflows(pgqrs))
                    pause = pgqrs.ledger.call(lambda session: schedules.next_due(session, app=app, workflows=names))  # noqa: B023
            except StoreError as error:
                logger.warning("the scheduler tries again in %.0f s: %s", LONGEST_PAUSE, error)
            except Exception:
                logger.exception("the scheduler failed and goes on")
            self._stop.wait(min(LONGEST_PAUSE, max(0.0, LONGEST_PAUSE if pause is None else pause)))
