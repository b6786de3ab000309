"""A built workflow: enqueue, in the caller's transaction if need be, follow, and execute in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pgqrs_celery.borrowing import BorrowedSession, driver_connection
from pgqrs_celery.compat.underway_cron import Cron
from pgqrs_celery.compat.underway_runtime import Runtime
from pgqrs_celery.compat.underway_types import Typed
from pgqrs_celery.exceptions import NotDurable
from pgqrs_celery.session import Session
from pgqrs_celery.store import schedules
from pgqrs_celery.store.schedules import NewSchedule
from pgqrs_celery.workflow import Workflow as NamedCanvas
from pgqrs_celery.workflow import WorkflowRun

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs

__all__ = ["BuiltWorkflow", "Enqueued"]


def put(session: Session, new: NewSchedule) -> None:
    """Enter a schedule whose next time is reckoned from the database's clock."""
    cron = Cron(new.cron, new.zone)
    schedules.put(session, replace(new, next_fire_at=cron.after(schedules.now(session))))


class Enqueued(WorkflowRun):
    """A handle on one run."""

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> Any:
        """Wait for the run's end and return the value of its ``To.done(value)``; see ``WorkflowRun.get``."""
        state = super().get(timeout, propagate=propagate)
        return state["done"] if isinstance(state, dict) else state


class BuiltWorkflow:
    """Typed steps under a name."""

    def __init__(self, pgqrs: Pgqrs, name: str, canvas: Any, input_type: Typed) -> None:
        self.pgqrs = pgqrs
        self.name = name
        self.input = input_type
        self._named = NamedCanvas(pgqrs, name, canvas)

    def __repr__(self) -> str:
        return f"<Workflow {self.name}>"

    def state(self, value: Any) -> dict[str, Any]:
        """Return what the first step is given; raises ``InvalidInput`` here, not in a worker."""
        return {"next": self.input.dump(value)}

    def enqueue(
        self,
        value: Any = None,
        *,
        delay: float = 0.0,
        workflow_key: str | None = None,
        labels: Mapping[str, Any] | None = None,
    ) -> Enqueued:
        """Start a run and return its handle; the same ``workflow_key`` again is the same run.

        Raises ``InvalidInput`` where the value is not what the first step takes.
        """
        state = self.state(value)
        if self.pgqrs.app.conf.task_always_eager:
            raise NotDurable(
                f"workflow {self.name!r} cannot be executed with task_always_eager: a suspended step needs a worker "
                "that goes on with it; in tests, start one with runtime().start()"
            )
        options: dict[str, Any] = {"countdown": delay} if delay > 0 else {}
        run = self._named.apply_async((state,), workflow_key=workflow_key, labels=labels, **options)
        return Enqueued(self.pgqrs, run.id)

    def enqueue_using(self, connection: Any, value: Any = None, *, workflow_key: str | None = None) -> Enqueued:
        """Start a run in the caller's transaction: it exists if and only if that commits.

        ``connection`` is a psycopg connection, a SQLAlchemy connection or session, or a Django connection or alias.
        """
        run = self._named.enqueue_using(connection, self.state(value), workflow_key=workflow_key)
        return Enqueued(self.pgqrs, run.id)

    def start_in(self, connection: Any, state: dict[str, Any], workflow_key: str) -> WorkflowRun:
        """Start a run from a state that was checked before, in the caller's transaction; the scheduler does that."""
        return self._named.enqueue_using(connection, state, workflow_key=workflow_key)

    def schedule(self, cron: str | Cron, value: Any = None, **options: Any) -> None:
        """Start a run whenever cron says so, as in ``schedule("0 2 * * *[Europe/Berlin]", Cleanup(7))``.

        The options: ``name``, of which a workflow may have several (its own by default; the same name again changes
        the schedule); ``catch_up=True`` makes up for every time that was missed while no worker ran, instead of
        with one run for all of them; ``overlap=False`` passes over a time at which the last run has not ended. Raises
        ``ConfigurationError`` and ``InvalidInput``.
        """
        new = self._schedule(cron, value, **options)
        self.pgqrs.ledger.call(lambda session: put(session, new), transaction=True)

    def schedule_using(self, connection: Any, cron: str | Cron, value: Any = None, **options: Any) -> None:
        """Do that in the caller's transaction: the schedule exists if and only if that commits."""
        new = self._schedule(cron, value, **options)
        put(BorrowedSession(driver_connection(connection), self.pgqrs.ledger.database.texts), new)

    def unschedule(self, name: str | None = None) -> bool:
        """Remove a schedule; False where there was none. Its runs are not touched."""
        ledger = self.pgqrs.ledger
        return ledger.call(lambda session: schedules.remove(session, app=ledger.app, name=name or self.name))

    def _schedule(
        self,
        cron: str | Cron,
        value: Any,
        *,
        name: str | None = None,
        catch_up: bool = False,
        overlap: bool = True,
    ) -> NewSchedule:
        parsed = Cron.parse(cron) if isinstance(cron, str) else cron
        ledger = self.pgqrs.ledger
        args = ledger.values.dump(self.state(value))
        return NewSchedule(
            ledger.app, name or self.name, self.name, parsed.fields, parsed.zone, args, catch_up, overlap, None
        )

    def run(self, run_id: int) -> Enqueued:
        """Return the handle of a run by its id."""
        return Enqueued(self.pgqrs, run_id)

    def runtime(self, **options: Any) -> Runtime:
        """Return a runtime for this workflow's app; options are a Celery worker's (``concurrency``, ``queues`` …)."""
        return Runtime(self.pgqrs.app, **options)
