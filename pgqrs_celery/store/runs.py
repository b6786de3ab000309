"""Runs: the write side of ``pgqrs_workflows``.

Lock order: a run's row is locked before its steps by ``record`` from outside, ``resume``, ``park`` and ``unpause``;
everywhere else one of the two at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgqrs_celery.exceptions import RunNotFound, RunStateError
from pgqrs_celery.session import Session
from pgqrs_celery.states import Status
from pgqrs_celery.store import inner, recording, steps
from pgqrs_celery.store.recording import NewStep, Outcome, Recorded

__all__ = ["NewRun", "Run", "cancel", "close_if_quiet", "find", "join", "resume", "start"]


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be entered; the payloads are JSON text."""

    app: str
    root_id: str
    name: str
    workflow_key: str | None = None
    input: str | None = None
    result: str | None = None
    plan: str | None = None
    labels: str | None = None
    #: The task of another run that has started this one, and is woken when it ends.
    parent_task_id: str | None = None

    def params(self) -> dict[str, object]:
        """Return the run as the parameters of a statement."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Run:
    """One run as it stands; ``result`` says where its outcome appears in the result backend."""

    workflow_id: int
    root_id: str
    name: str
    status: str
    input: str | None
    result: str | None
    output: str | None
    error: str | None


def start(session: Session, run: NewRun, new: Sequence[NewStep]) -> tuple[int, list[Recorded]] | None:
    """Enter a new run with its first steps in one statement; None where the root id or the key is taken.

    Raises ``StoreError`` where one of the steps' task ids belongs to another run.
    """
    answers = session.rows("runs.start", {**run.params(), "messages": recording.rows(new)})
    if not answers:
        return None
    return answers[0][0], [Recorded(task_id, Outcome.SEND, at) for _, task_id, at in answers]


def join(session: Session, run: NewRun, new: Sequence[NewStep]) -> tuple[int, list[Recorded]]:
    """Enter steps into a run that may exist, in the caller's transaction; a closed run is opened again.

    The run's row is locked before the insert: a closing look that runs at the same time either sees the new steps or
    comes first, and then the run is opened again.
    """
    found = session.row("runs.ensure", run.params())
    if found is None:
        raise RunNotFound(f"the run of root task {run.root_id} vanished while it was written")
    workflow_id, status = int(found[0]), str(found[1])
    recorded = recording.record(session, new, workflow_id=workflow_id, app=run.app)
    if status in (Status.SUCCESS, Status.FAILED) and any(r.outcome is Outcome.SEND for r in recorded):
        session.run("runs.reopen", {"workflow_id": workflow_id})
    return workflow_id, recorded


def find(
    session: Session, *, workflow_id: int | None = None, root_id: str | None = None, key: tuple[str, str] | None = None
) -> Run | None:
    """Return a run by its id, by its root task, or by (app, workflow key)."""
    if workflow_id is not None:
        return session.one(Run, "runs.by_id", {"workflow_id": workflow_id})
    if root_id is not None:
        return session.one(Run, "runs.by_root", {"root_id": root_id})
    if key is not None:
        return session.one(Run, "runs.by_key", {"app": key[0], "workflow_key": key[1]})
    raise TypeError("find() needs workflow_id, root_id or key")


def touch(session: Session, workflow_id: int) -> None:
    """Mark a run as running; skipped where somebody else is writing its row at this moment."""
    session.run("runs.touch", {"workflow_id": workflow_id})


def begin(session: Session, workflow_id: int) -> None:
    """Mark a locked run as running, in the caller's transaction."""
    session.run("runs.begin", {"workflow_id": workflow_id})


def close_if_quiet(session: Session, workflow_id: int) -> str | None:
    """Close a run nothing of which is open: an unlocked look, then lock, then look again in the next statement.

    Returns the final status if this call closed it. Not to be called inside a transaction: the look must have a
    snapshot of its own, taken after the commit of the hand-off that preceded it.
    """
    row = session.row("runs.close_if_quiet", {"workflow_id": workflow_id})
    assert row is not None
    quiet, closed = row
    return close_awaited(session, workflow_id) if quiet and closed is None else closed


def close_awaited(session: Session, workflow_id: int) -> str | None:
    """Close a quiet run, and wake the function that waits for it in the same transaction."""
    run = {"workflow_id": workflow_id}
    with session.connection.transaction():
        locked = session.row("runs.lock_open", run)
        closed = session.row("runs.close", run) if locked is not None else None
        if locked and closed and closed[0] is not None and locked[0] is not None:
            inner.wake_waiter(session, locked[0])
    return closed[0] if closed else None


def stuck(session: Session, *, app: str, after: int, age: float, batch: int) -> tuple[list[int], int | None]:
    """Look at the next open runs after a run id; returns those with nothing open, and the last id looked at.

    The last id is None at the end of the round.
    """
    rows = session.rows("runs.stuck", {"app": app, "after": after, "age": age, "batch": batch})
    return [row[0] for row in rows if row[1]], rows[-1][0] if len(rows) == batch else None


def cancel(session: Session, workflow_id: int) -> bool:
    """Mark a run cancelled; False where it has ended otherwise. Its steps are cancelled in batches afterwards."""
    with session.connection.transaction():
        row = session.row("runs.cancel", {"workflow_id": workflow_id})
        if row is not None and row[1] is not None:
            inner.wake_waiter(session, row[1])
    return row is not None


def resume(session: Session, workflow_id: int) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Set a failed run going again, in the caller's transaction.

    Returns the steps that are queued again (task id, step id, message), and the tasks that functions will send anew
    because they were undone (task id, name). Raises ``RunNotFound`` and ``RunStateError``.
    """
    found = session.row("runs.lock_failed", {"workflow_id": workflow_id})
    if found is None:
        raise RunNotFound(f"run {workflow_id} does not exist (or was removed by retention)")
    if found[0] != Status.FAILED:
        raise RunStateError(f"run {workflow_id} is {found[0]}; only a FAILED run can be resumed")
    anew = inner.again(session, workflow_id, "")
    queued = steps.resume(session, workflow_id)
    if not queued:
        raise RunStateError(f"run {workflow_id} is FAILED, but {_why_not(session, workflow_id)}")
    session.run("runs.resume", {"workflow_id": workflow_id})
    return queued, anew


def _why_not(session: Session, workflow_id: int) -> str:
    """Return why a failed run cannot be sent again, and what to do instead."""
    row = session.row("runs.in_process", {"workflow_id": workflow_id})
    if row is None:
        return "none of its steps can be sent again"
    name, key = row
    by_key = f", or with pgqrs.context({name!r}, …, workflow_key={key!r})" if key is not None else ""
    return (
        "it is executed by the process that calls its function, and there is no message to be sent again: call the "
        f"function again with its context, pgqrs.context(run={workflow_id}){by_key}; steps that have succeeded are "
        "skipped"
    )


def pause(session: Session, workflow_id: int) -> bool:
    """Let no further step of a run begin; False where the run has ended."""
    return session.row("runs.pause", {"workflow_id": workflow_id}) is not None


def park(session: Session, workflow_id: int, task_id: str) -> bool:
    """Let a queued step of a paused run wait, in the caller's transaction; False where the run has gone on.

    First the run is locked, then the step is parked: an ``unpause`` at the same time either comes first, or waits and
    then sees the parked step.
    """
    if session.row("runs.lock_paused", {"workflow_id": workflow_id}) is None:
        return False
    session.run("runs.park", {"task_id": task_id})
    return True


def unpause(session: Session, workflow_id: int) -> bool:
    """Let steps begin again, in the caller's transaction; False where the run was not paused."""
    if session.row("runs.unpause", {"workflow_id": workflow_id}) is None:
        return False
    session.run("runs.wake_parked", {"workflow_id": workflow_id})
    return True


def plan(session: Session, workflow_id: int) -> str | None:
    """Return the stored tails of a run's long chains."""
    row = session.row("runs.plan", {"workflow_id": workflow_id})
    return row[0] if row else None


def notify(session: Session, channel: str) -> None:
    """Wake the relays that listen on a channel; delivered with the commit."""
    session.row("runs.notify", {"channel": channel})
