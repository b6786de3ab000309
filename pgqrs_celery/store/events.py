"""Events: what a run is told from outside, and the functions that wait to be told.

The event's row is the meeting point. Whoever emits and whoever waits lock it first, so one of them comes second and
sees what the other did; a function is found by the task ids in the row, not by its status, which may be uncommitted.
Both lock the event before the function.
"""

from __future__ import annotations

from pgqrs_celery.exceptions import RunNotFound
from pgqrs_celery.session import Session
from pgqrs_celery.store import inner, runs
from pgqrs_celery.store.inner import Owner, Wait, Waited

__all__ = ["await_event", "emit"]


def emit(session: Session, workflow_id: int, name: str, payload: str) -> bool:
    """Tell a run something, in the caller's transaction; False where it has been told this before.

    The payload is JSON text. Raises ``RunNotFound``.
    """
    row = session.row("events.emit", {"workflow_id": workflow_id, "name": name, "payload": payload})
    if row is None:
        if runs.find(session, workflow_id=workflow_id) is None:
            raise RunNotFound(f"run {workflow_id} does not exist: event {name!r} cannot be emitted")
        return False
    if row[0]:
        session.run("events.wake", {"waiters": row[0]})
    return True


def await_event(
    session: Session, owner: Owner, step_id: str, name: str, *, timeout: float | None, on_timeout: str, park: bool
) -> Wait:
    """Wait for an event, in the caller's transaction.

    ``on_timeout`` is the error (JSON text) that is recorded where the time-out comes first. The branch taken is
    recorded in this transaction, so that a replay takes the same one.
    """
    event = session.row("events.await", {"workflow_id": owner.workflow_id, "name": name, "waiter": owner.task_id})
    assert event is not None
    if session.row("inner.own", owner.params()) is None:
        return Wait(Waited.LOST)
    entered = inner.enter_wait(session, owner, step_id, "wait_for_event", seconds=timeout)
    if entered.waited is not Waited.AWAKE:
        return entered
    emitted, payload = event
    if emitted:
        inner.decide(session, owner, step_id, output=payload)
        return Wait(Waited.DECIDED, output=payload)
    if entered.seconds_left is not None and entered.seconds_left <= 0:
        session.run("events.leave", {"workflow_id": owner.workflow_id, "name": name, "waiter": owner.task_id})
        inner.decide(session, owner, step_id, error=on_timeout)
        return Wait(Waited.DECIDED, error=on_timeout)
    return inner.park_or_not(session, owner, step_id, entered, park=park)
