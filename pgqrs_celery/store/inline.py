"""Runs executed in the calling process: a function's row without a message, which no relay ever sends.

It has no lease that would have to be renewed: whoever executes the function last takes it, and every write of a former
owner is refused. A script that was killed can thus be started again at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from pgqrs_celery.exceptions import RunNotFound, RunStateError, StoreError
from pgqrs_celery.session import Session
from pgqrs_celery.states import Status
from pgqrs_celery.store import runs, steps
from pgqrs_celery.store.inner import Owner
from pgqrs_celery.store.recording import NewStep
from pgqrs_celery.store.runs import NewRun

__all__ = ["InlineRun", "create", "find", "settle", "take"]


@dataclass(frozen=True, slots=True)
class InlineRun:
    """A run and its function, where it has one that is executed in the calling process."""

    run_status: str
    name: str
    task_id: str | None
    step_id: str | None
    status: str | None
    output: str | None
    error: str | None


def create(session: Session, run: NewRun) -> tuple[int, str]:
    """Enter a run whose function nobody executes yet, or find the one that has its key; returns its id and name."""
    step = NewStep(run.root_id, f"{run.name}()", run.name, 0, None, None, None, sent=False, kind="function")
    started = runs.start(session, run, [step])
    if started is not None:
        return started[0], run.name
    found = runs.find(session, root_id=run.root_id)
    if found is None and run.workflow_key is not None:
        found = runs.find(session, key=(run.app, run.workflow_key))
    if found is None:
        raise StoreError(f"run {run.name!r} was neither entered nor found: it was removed at this moment")
    return found.workflow_id, found.name


def find(session: Session, workflow_id: int) -> InlineRun:
    """Return a run; raises ``RunNotFound``, and ``RunStateError`` where workers execute it."""
    found = session.one(InlineRun, "inline.function", {"workflow_id": workflow_id})
    if found is None:
        raise RunNotFound(f"run {workflow_id} does not exist (or was removed by retention)")
    if found.task_id is None:
        raise RunStateError(
            f"run {workflow_id} of {found.name!r} is executed by workers, it cannot be executed here; "
            "a failed one is set going again with its resume()"
        )
    return found


def take(session: Session, workflow_id: int, lease_token: UUID) -> tuple[Owner, str] | None:
    """Take a run's function, in the caller's transaction; returns its owner and step id.

    None where the run has succeeded. Raises ``RunNotFound`` and ``RunStateError``.
    """
    locked = session.row("runs.lock_failed", {"workflow_id": workflow_id})
    row = None
    if locked is not None and locked[0] != Status.CANCELLED:
        row = session.row("inline.take", {"workflow_id": workflow_id, "lease_token": lease_token})
    if row is None:
        found = find(session, workflow_id)
        if found.run_status == Status.SUCCESS:
            return None
        raise RunStateError(f"run {workflow_id} is {found.run_status}; it cannot be executed any more")
    runs.begin(session, workflow_id)
    app, task_id, step_id, generation = row
    return Owner(workflow_id, app, task_id, str(lease_token), generation), step_id


def settle(session: Session, owner: Owner, *, output: str | None = None, error: str | None = None) -> bool:
    """End the execution of a function, with a result or an error; False where it belongs to another owner.

    To be called in a transaction: nobody looks after such a run, so it must close together with its function. That is
    safe because nothing else of it can come to its end at the same moment: it has no tasks.
    """
    status = Status.FAILED if error is not None else Status.SUCCESS
    session.run("inline.settle", {**owner.params(), "status": status.value, "output": output, "error": error})
    if not steps.finished_as(session, owner.task_id, status, UUID(owner.lease_token)):
        return False
    runs.close_if_quiet(session, owner.workflow_id)
    return True
