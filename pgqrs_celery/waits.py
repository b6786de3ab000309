"""Waits: sleeping, events, children. Each is a generator that ends when the wait has.

In a worker the first look that finds nothing parks the function, and the generator raises ``Suspended``. Where the
calling process executes the function itself, the generator yields the seconds after which to look again; whoever
drives it decides how to spend them (a thread waits, a coroutine sleeps).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from pgqrs_celery.exceptions import EventTimeout, StepFailed, StoreError
from pgqrs_celery.failures import dump_error, load_error
from pgqrs_celery.journal import Journal, current_step
from pgqrs_celery.session import Session
from pgqrs_celery.states import Status
from pgqrs_celery.store import events, inner
from pgqrs_celery.store.inner import Child, Inner, Wait, Waited

__all__ = ["Pending", "Waiting", "ended", "results_of", "sleeping", "waiting_for_event"]

#: A wait, as something to be driven: yields pauses in seconds, returns its outcome.
Waiting = Generator[float, None, Any]

#: Pauses between two looks of a process that waits itself, in seconds.
FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.5

UNFINISHED: Final = frozenset({Status.QUEUED, Status.RUNNING, Status.PAUSED})


@dataclass(frozen=True, slots=True)
class Pending:
    """Something started that can be waited for: a task (by its id), or a run (by its root id)."""

    step_id: str
    key: str
    workflow_id: int | None = None

    @property
    def id(self) -> int | None:
        """The run's id, where this is a run."""
        return self.workflow_id


def sleeping(journal: Journal, step_id: str, *, seconds: float | None, until: datetime | None) -> Waiting:
    """Wait until a deadline; it is fixed the first time and the same on every replay."""
    found = journal.recall(step_id)
    if found is None:
        yield from _wait(
            journal,
            step_id,
            lambda session, park: inner.sleep(session, journal.owner, step_id, seconds=seconds, until=until, park=park),
        )


def waiting_for_event(journal: Journal, step_id: str, name: str, timeout: float | None) -> Waiting:
    """Wait for an event and return its payload; raises ``EventTimeout``."""
    found = journal.recall(step_id)
    if found is None:
        error = EventTimeout(f"event {name!r} did not come within {timeout} s")
        outcome = yield from _wait(
            journal,
            step_id,
            lambda session, park: events.await_event(
                session,
                journal.owner,
                step_id,
                name,
                timeout=timeout,
                on_timeout=dump_error(error),
                park=park,
            ),
        )
        found = Inner(step_id, Status.SUCCESS, 0, None, outcome.output, outcome.error, None)
    if found.error is not None:
        raise load_error(found.error)
    return journal.value(found)


def _wait(journal: Journal, step_id: str, look: Callable[[Session, bool], Wait]) -> Generator[float, None, Wait]:
    """Look until the wait is over."""
    journal.go_beyond(step_id)
    wait = yield from _looking(journal, step_id, look)
    return wait


def _look(look: Callable[[Session, bool], Wait], park: bool, session: Session) -> Wait:
    return look(session, park)


def _looking(
    journal: Journal, step_id: str, look: Callable[[Session, bool], Wait], *, parks: bool = True
) -> Generator[float, None, Wait]:
    """Look until a wait is over; the function is parked, where it can be, as soon as nothing is under way beside it."""
    pause = FIRST_PAUSE
    with journal.bodies.waiting(current_step()):
        while True:
            journal.check()
            with journal.bodies.parking(parks and journal.parks) as park:
                wait = journal.call(partial(_look, look, park), transaction=True)
                if wait.waited is Waited.PARKED:
                    journal.suspend(step_id)
            if wait.waited is Waited.DECIDED:
                return wait
            if wait.waited is Waited.LOST:
                journal.lose()
            pause = min(pause * 1.5, LONGEST_PAUSE)
            yield pause if wait.seconds_left is None else min(pause, wait.seconds_left)


def results_of(
    journal: Journal,
    step_id: str,
    pending: Sequence[Pending],
    outcome_of_run: Callable[[int], Any],
    *,
    return_exceptions: bool,
) -> Waiting:
    """Wait until everything has ended and return the results in order.

    The first error is raised, after all have ended. It is recorded under ``step_id`` that the function was told of it:
    this attempt of the function sees it again on every replay, the next attempt makes the failed tasks run again.
    """
    found = journal.take(step_id)
    told = found is not None and found.status == Status.FAILED and found.generation == journal.owner.generation
    if found is not None and found.status == Status.SUCCESS:
        return journal.value(found)
    children = yield from ended(journal, step_id, pending)
    failed = [child for child in children.values() if child.status == Status.FAILED]
    if failed and found is not None and found.status == Status.FAILED and not told:
        journal.go_beyond(step_id)
        journal.call(lambda session: inner.children_again(session, journal.owner.workflow_id, failed), transaction=True)
        children = yield from ended(journal, step_id, pending)
    results = [_outcome(journal, one, children.get(one.key), outcome_of_run) for one in pending]
    errors = [result for result in results if isinstance(result, _Failed)]
    if errors and not return_exceptions:
        if not told:
            journal.fail(step_id, errors[0].error)
        raise errors[0].error
    values = [result.error if isinstance(result, _Failed) else result for result in results]
    if not errors and any(one.workflow_id is not None for one in pending):
        values = journal.succeed(step_id, values)
    return values


@dataclass(frozen=True, slots=True)
class _Failed:
    """The error of a child; a class of its own, because a result may be any value, an exception included."""

    error: Exception


def ended(journal: Journal, step_id: str, pending: Sequence[Pending]) -> Generator[float, None, dict[str, Child]]:
    """Wait until everything has ended; returns the tasks among it by their ids."""
    recorded = {}
    for one in pending:
        row = journal.sent(one.step_id) if one.workflow_id is None else None
        if row is not None and (row.status == Status.SUCCESS or row.is_undone):
            recorded[one.key] = Child(one.key, one.step_id, row.status, row.output, row.error)
    tasks = [one.key for one in pending if one.workflow_id is None and one.key not in recorded]
    runs = [one.key for one in pending if one.workflow_id is not None]
    if not tasks and not runs:
        return recorded

    def look(session: Session, park: bool) -> Wait:
        waited = inner.await_children(session, journal.owner, task_ids=tasks, root_ids=runs, park=park)
        if waited is Waited.AWAKE:
            journal.go_beyond(step_id)
        return Wait(waited)

    yield from _looking(journal, step_id, look, parks=not journal.looks_back)
    ended = journal.call(lambda session: inner.children(session, tasks)) if tasks else []
    return {**recorded, **{child.task_id: child for child in ended}}


def _outcome(
    journal: Journal, one: Pending, child: Child | None, outcome_of_run: Callable[[int], Any]
) -> Any | _Failed:
    if one.workflow_id is not None:
        try:
            return outcome_of_run(one.workflow_id)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the run ended with is its outcome
            return _Failed(error)
    if child is None:
        return _Failed(StepFailed(f"task {one.key} of step {one.step_id!r} is not in the ledger any more"))
    if child.status == Status.SUCCESS or child.is_undone:
        return journal.ledger.values.load(child.output)
    if child.status == Status.FAILED:
        return _Failed(load_error(child.error))
    return _Failed(StepFailed(f"task {one.key} of step {one.step_id!r} was {child.status}"))
