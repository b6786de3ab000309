"""Steps: who may execute one, and what comes of it; one function per statement of the protocol.

Payloads (``message``, ``output``, ``error``) are JSON text; what is in them is ``codec``'s and ``envelope``'s business.
The transition table that these statements implement is drawn in ``docs/architecture.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pgqrs_celery.session import TRUE, Session
from pgqrs_celery.store.recording import NewStep

__all__ = [
    "Acquired",
    "BrokenHandOff",
    "Peeked",
    "Verdict",
    "acquire",
    "adopt",
    "bereave",
    "cancel_batch",
    "drop",
    "fail",
    "finished_as",
    "give_back",
    "give_up_hand_off",
    "hand_off",
    "hand_off_failed",
    "peek",
    "resume",
    "revoke",
    "succeed",
    "undo_first",
    "unfinished",
]


class Verdict(StrEnum):
    """What ``acquire`` answers."""

    EXECUTE = "EXECUTE"
    REPLAY = "REPLAY"
    DONE = "DONE"
    STALE = "STALE"
    HELD = "HELD"
    CANCELLED = "CANCELLED"
    PAUSED = "PAUSED"
    POISONED = "POISONED"
    #: Like EXECUTE, of a function that has ended already (``error`` says how): to undo what it has done.
    UNDO = "UNDO"


@dataclass(frozen=True, slots=True)
class Acquired:
    """The answer to ``acquire``; ``status`` and the payloads are those found in the row."""

    verdict: str
    workflow_id: int
    step_id: str
    status: str
    output: str | None
    error: str | None
    workflow_name: str
    root_id: str
    touch: bool
    generation: int
    fence: int | None
    attempt: int | None
    lost: int | None
    now: datetime


@dataclass(frozen=True, slots=True)
class Peeked:
    """One step as it stands."""

    workflow_id: int
    step_id: str
    status: str
    open: bool
    generation: int
    fence: int
    lease_token: UUID | None
    output: str | None
    error: str | None
    run_status: str


def acquire(
    session: Session,
    task_id: str,
    *,
    generation: int,
    lease_token: UUID,
    worker_id: UUID | None,
    lease: float,
    max_lost: int,
    poison: str,
    may_judge: bool,
) -> Acquired | None:
    """Ask for the right to execute a step and take it where the answer is EXECUTE; None where no row exists.

    ``may_judge`` says whether the end of a lease may be believed.

    May commit asynchronously: if a crash of Postgres loses it, the random token makes every later write of the
    owner who was told EXECUTE fail.
    """
    params = {
        "task_id": task_id,
        "generation": generation,
        "lease_token": lease_token,
        "worker_id": worker_id,
        "lease": lease,
        "max_lost": max_lost,
        "poison": poison,
        "may_judge": may_judge,
    }
    row = session.quick_row("steps.begin", params) or session.quick_row("steps.acquire", params)
    return None if row is None else _acquired(row)


def pass_on(
    session: Session,
    finished_id: str,
    *,
    fence: int,
    task_id: str,
    generation: int,
    lease_token: UUID,
    worker_id: UUID | None,
    lease: float,
) -> Acquired | None:
    """End the hand-off of a successful step and take the next one; None where that is not simply to be had.

    ``fence`` is that under which the step was finished. The hand-off is ended in any case.
    """
    row = session.quick_row(
        "steps.pass_on",
        {
            "finished_id": finished_id,
            "finished_fence": fence,
            "task_id": task_id,
            "generation": generation,
            "lease_token": lease_token,
            "worker_id": worker_id,
            "lease": lease,
        },
    )
    return None if row is None else _acquired(row)


def _acquired(row: tuple[Any, ...]) -> Acquired:
    verdict, run, step, status, output, error, name, root, touch, generation, fence, attempt, lost, now = row
    return Acquired(
        verdict=verdict.decode(),
        workflow_id=int(run),
        step_id=step.decode(),
        status=status.decode(),
        output=None if output is None else output.decode(),
        error=None if error is None else error.decode(),
        workflow_name=name.decode(),
        root_id=root.decode(),
        touch=touch == TRUE,
        generation=int(generation),
        fence=None if fence is None else int(fence),
        attempt=None if attempt is None else int(attempt),
        lost=None if lost is None else int(lost),
        now=datetime.fromtimestamp(float(now), UTC),
    )


def adopt(
    session: Session,
    step: NewStep,
    *,
    workflow_id: int,
    app: str,
    lease_token: UUID,
    worker_id: UUID | None,
    lease: float,
) -> bool:
    """Enter a step that was sent without this package, as running here; False where somebody was quicker."""
    return bool(
        session.run(
            "steps.adopt",
            {
                "workflow_id": workflow_id,
                "step_id": step.step_id,
                "app": app,
                "task_id": step.task_id,
                "task_name": step.task_name,
                "kind": step.kind,
                "generation": step.generation,
                "message": step.message,
                "queue": step.queue,
                "lease_token": lease_token,
                "worker_id": worker_id,
                "lease": lease,
            },
        )
    )


def succeed(session: Session, task_id: str, *, lease_token: UUID, output: str) -> bool:
    """Commit a step's result; False where the step belongs to somebody else by now.

    Repeating it after a lost answer is harmless.
    """
    if session.run("steps.succeed", {"task_id": task_id, "lease_token": lease_token, "output": output}):
        return True
    return finished_as(session, task_id, "SUCCESS", lease_token)


def fail(
    session: Session,
    task_id: str,
    *,
    error: str,
    lease: float,
    lease_token: UUID | None = None,
    worker_id: UUID | None = None,
    generation: int = 0,
    undoing: bool = False,
) -> int | None:
    """Commit a step's final error, as its owner (token) or as its worker's main process (worker and generation).

    Returns the fence to hand it off under, None where the step belongs to somebody else by now. ``undoing`` says that
    it was executed to undo what it had done; reports about executions before that come too late.
    """
    row = session.row(
        "steps.fail",
        {
            "task_id": task_id,
            "error": error,
            "lease": lease,
            "lease_token": lease_token,
            "worker_id": worker_id,
            "generation": generation,
            "undoing": undoing,
        },
    )
    if row is not None or lease_token is None:
        return row[0] if row else None
    return _fence_of(session, task_id, "FAILED", lease_token)


def undo_first(session: Session, task_id: str, *, error: str, generation: int, worker_id: UUID | None = None) -> bool:
    """Let a function that has ended outside of its body be executed once more, to undo what it has done.

    False where there is nothing to undo, or it is being undone, or the worker does not have it. Called in place of what
    would end the step, by the worker that has it; the error is the one that it ends with after that.
    """
    return bool(
        session.run(
            "steps.undo_first",
            {"task_id": task_id, "error": error, "generation": generation, "worker_id": worker_id},
        )
    )


def finished_as(session: Session, task_id: str, status: str, lease_token: UUID) -> bool:
    """Return whether a step already has this status under this token."""
    return _fence_of(session, task_id, status, lease_token) is not None


def _fence_of(session: Session, task_id: str, status: str, lease_token: UUID) -> int | None:
    row = peek(session, task_id)
    return row.fence if row is not None and (row.status, row.lease_token) == (status, lease_token) else None


def give_back(session: Session, task_id: str, *, lease_token: UUID) -> bool:
    """Queue a running step again, due at once, as its owner."""
    return bool(session.run("steps.give_back", {"task_id": task_id, "lease_token": lease_token}))


def bereave(
    session: Session,
    task_id: str,
    *,
    worker_id: UUID,
    max_lost: int,
    poison: str,
    counted: bool = True,
    generation: int | None = None,
    pid: int | None = None,
) -> bool:
    """Make due a step whose process is gone, as the worker it belonged to; at the limit the step is FAILED.

    With the ``generation`` of the message the process had, also a step that it had not acquired yet. With its ``pid``,
    no step that another process of the worker has by now: a lease token ends with the id of who has it.
    """
    return bool(
        session.run(
            "steps.bereave",
            {
                "task_id": task_id,
                "worker_id": worker_id,
                "max_lost": max_lost,
                "poison": poison,
                "count": int(counted),
                "generation": generation,
                "pid": None if pid is None else f"{pid:08x}",
            },
        )
    )


def drop(session: Session, task_id: str, *, lease_token: UUID, error: str) -> int | None:
    """Cancel a step whose body asked to be ignored; returns its run."""
    row = session.row("steps.drop", {"task_id": task_id, "lease_token": lease_token, "error": error})
    return row[0] if row else None


def revoke(
    session: Session,
    task_id: str,
    *,
    error: str,
    lease: float,
    generation: int,
    worker_id: UUID | None = None,
    lease_token: UUID | None = None,
) -> int | None:
    """Cancel a step that is not running elsewhere; its hand-off (the announcement) is still open.

    Returns the fence to hand it off under, None where it is running elsewhere or finished.
    """
    row = session.row(
        "steps.revoke",
        {
            "task_id": task_id,
            "error": error,
            "lease": lease,
            "generation": generation,
            "worker_id": worker_id,
            "lease_token": lease_token,
        },
    )
    return row[0] if row else None


def hand_off(session: Session, task_id: str, *, fence: int) -> int | None:
    """Note that everything that follows from a finished step has happened; returns its run the first time.

    ``fence`` is that of the execution which has finished it: whoever stalls here while the user resumes the failed run
    must not end the hand-off of what was executed after that.
    """
    row = session.quick_row("steps.hand_off", {"task_id": task_id, "fence": fence})
    return int(row[0]) if row and row[0] else None


@dataclass(frozen=True, slots=True)
class BrokenHandOff:
    """A successful step whose hand-off did not work, for the ``tries``-th time."""

    workflow_id: int
    step_id: str
    fence: int
    tries: int
    output: str | None


def hand_off_failed(session: Session, task_id: str, *, fence: int, error: str, interval: float) -> BrokenHandOff | None:
    """Note why a hand-off did not work, to be repeated in ``interval`` seconds; None where it is done already."""
    row = session.row(
        "steps.hand_off_failed", {"task_id": task_id, "fence": fence, "error": error, "interval": interval}
    )
    return BrokenHandOff(*row) if row else None


def give_up_hand_off(session: Session, task_id: str, *, fence: int) -> int | None:
    """End a hand-off that cannot work; the step stays SUCCESS with its error, for ``resume``."""
    row = session.row("steps.give_up_hand_off", {"task_id": task_id, "fence": fence})
    return row[0] if row else None


def peek(session: Session, task_id: str) -> Peeked | None:
    """Return one step as it stands."""
    return session.one(Peeked, "steps.peek", {"task_id": task_id})


def cancel_batch(session: Session, workflow_id: int, *, batch: int) -> list[tuple[str, str | None]]:
    """Cancel some unfinished steps of a cancelled run; returns their task ids and messages.

    Functions with something to undo are queued for that.
    """
    rows = session.rows("steps.cancel_batch", {"workflow_id": workflow_id, "batch": batch})
    return [(row[0], row[1]) for row in rows]


def unfinished(session: Session, workflow_id: int) -> int:
    """Return how many steps of a run are queued, running or paused."""
    row = session.row("steps.unfinished", {"workflow_id": workflow_id})
    return int(row[0]) if row else 0


def resume(session: Session, workflow_id: int) -> list[tuple[str, str, str]]:
    """Queue a run's failed steps and hand-offs again; returns task id, step id and message of each."""
    return [(row[0], row[1], row[2]) for row in session.rows("steps.resume", {"workflow_id": workflow_id})]
