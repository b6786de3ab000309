"""Steps: the write side of ``pgqrs_workflow_steps``, one function per statement of the protocol.

Payloads (``message``, ``output``, ``error``) are JSON text; what is in them is ``codec``'s and ``envelope``'s business.
The transition table that these statements implement is drawn in ``docs/architecture.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from pgqrs_celery.db import TRUE, Session

__all__ = [
    "Acquired",
    "DueStep",
    "Finished",
    "NewStep",
    "Outcome",
    "Peeked",
    "Recorded",
    "Verdict",
    "acquire",
    "adopt",
    "bereave",
    "fail",
    "give_back",
    "hand_off",
    "record",
    "succeed",
]

#: For statements whose loss in a crash of Postgres is harmless: they are repeated, or a random token tells.
ASYNC: Final = "off"

NEVER: Final = datetime.min.replace(tzinfo=UTC)


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


class Outcome(StrEnum):
    """What ``record`` answers for a message."""

    SEND = "SEND"
    SUPPRESS = "SUPPRESS"
    CANCELLED = "CANCELLED"
    #: The sender's success was not accepted (or its run is gone): nothing was recorded.
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class NewStep:
    """A message to be recorded. ``delay`` is seconds until it is due; ``sent`` says it is published right away."""

    task_id: str
    step_id: str
    task_name: str
    generation: int
    message: str | None
    queue: str | None
    delay: float | None
    sent: bool
    kind: str = "canvas"


@dataclass(frozen=True, slots=True)
class Finished:
    """A sender's own success (JSON text), to be committed together with what follows from it.

    With ``hand_off`` that is everything that follows: the step is handed off, too.
    """

    task_id: str
    output: str
    hand_off: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of one recorded message, and the database's time of it."""

    task_id: str
    outcome: Outcome
    sent_at: datetime


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
    lease_token: UUID | None
    output: str | None
    error: str | None
    run_status: str


@dataclass(frozen=True, slots=True)
class DueStep:
    """A step the relay has claimed: ``was`` is the status it was found with, ``status`` the one it has now."""

    workflow_id: int
    step_id: str
    task_id: str
    task_name: str
    was: str
    status: str
    sent_at: datetime | None
    now: datetime
    queue: str | None
    message: str | None
    looks: int
    handoffs: int
    lost: int
    error: str | None
    generation: int
    #: Whether it is sent to undo what it has done.
    undoing: bool


def rows(steps: Sequence[NewStep]) -> str:
    """Return the steps as one JSON array: a single parameter, where arrays would have to be quoted for each column."""
    return "[" + ",".join(map(_row, steps)) + "]"


def _row(step: NewStep) -> str:
    # The message is JSON text already; it becomes part of the row as it is.
    known = json.dumps(
        {
            "task_id": step.task_id,
            "step_id": step.step_id,
            "task_name": step.task_name,
            "generation": step.generation,
            "queue": step.queue,
            "delay": step.delay,
            "sent": step.sent,
            "kind": step.kind,
        }
    )
    return known if step.message is None else f'{known[:-1]}, "message": {step.message}}}'


def record(
    session: Session,
    steps: Sequence[NewStep],
    *,
    workflow_id: int,
    app: str,
    lease_token: UUID | None = None,
    finished: Finished | None = None,
    durable: bool = True,
) -> list[Recorded]:
    """Enter messages into an existing run, or accept greater generations of them; says what became of each.

    ``lease_token`` is the sender's own: only the owner of a running step may queue it again. With ``finished``, the
    sender's success is committed by the same statement; if it is not accepted, everything is LOST.
    """
    cursor = record_cursor(
        session,
        steps,
        workflow_id=workflow_id,
        app=app,
        lease_token=lease_token,
        finished=finished,
        durable=durable,
    )
    return recorded(steps, cursor.fetchall())


def record_cursor(
    session: Session,
    steps: Sequence[NewStep],
    *,
    workflow_id: int,
    app: str,
    lease_token: UUID | None = None,
    finished: Finished | None = None,
    durable: bool = True,
) -> Any:
    """Send the statement of ``record`` and return its cursor, to be read with ``recorded`` after a flush."""
    return session.send(
        "steps.record",
        {
            "messages": rows(steps),
            "finished_id": finished.task_id if finished else None,
            "output": finished.output if finished else None,
            "hand_off": finished.hand_off if finished else False,
            "workflow_id": workflow_id,
            "app": app,
            "lease_token": lease_token,
            "commit": session.durable if durable or finished else ASYNC,
        },
    )


def recorded(steps: Sequence[NewStep], answers: Sequence[tuple[Any, ...]]) -> list[Recorded]:
    """Return what the answers to a ``record`` say about each of its steps."""
    if not answers:
        return [Recorded(step.task_id, Outcome.LOST, NEVER) for step in steps]
    (_, status, sent_at), *accepted = sorted(answers, key=lambda answer: answer[0] is not None)
    sent = {answer[0] for answer in accepted}
    refused = Outcome.CANCELLED if status == "CANCELLED" else Outcome.SUPPRESS
    return [Recorded(s.task_id, Outcome.SEND if s.task_id in sent else refused, sent_at) for s in steps]


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


def await_link(session: Session, step: NewStep, *, workflow_id: int, app: str) -> None:
    """Enter a durable link that follows a plain one: its run stays open until the link's message comes."""
    session.run(
        "steps.await_link",
        {
            "workflow_id": workflow_id,
            "step_id": step.step_id,
            "app": app,
            "task_id": step.task_id,
            "task_name": step.task_name,
            "generation": step.generation,
        },
    )


def await_replacement(session: Session, task_id: str, *, lease_token: UUID, generation: int) -> bool:
    """Let a running step wait for the last link of the canvas that replaces it; False where it is not ours."""
    return bool(
        session.run(
            "steps.await_replacement", {"task_id": task_id, "lease_token": lease_token, "generation": generation}
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
) -> bool:
    """Commit a step's final error, as its owner (token) or as its worker's main process (worker and generation).

    ``undoing`` says that it was executed to undo what it had done; reports about executions before that come too late.
    """
    accepted = session.run(
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
    return bool(accepted) or (lease_token is not None and finished_as(session, task_id, "FAILED", lease_token))


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
    row = peek(session, task_id)
    return row is not None and row.status == status and row.lease_token == lease_token


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
) -> bool:
    """Make due a step whose process is gone, as the worker it belonged to; at the limit the step is FAILED.

    With the ``generation`` of the message the process had, also a step that it had not acquired yet.
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
) -> bool:
    """Cancel a step that is not running elsewhere; its hand-off (the announcement) is still open."""
    return bool(
        session.run(
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
    )


def hand_off(session: Session, task_id: str, *, durable: bool = False) -> int | None:
    """Note that everything that follows from a finished step has happened; returns its run the first time."""
    row = session.row("steps.hand_off", {"task_id": task_id, "commit": session.durable if durable else ASYNC})
    return row[0] if row else None


@dataclass(frozen=True, slots=True)
class BrokenHandOff:
    """A successful step whose hand-off did not work, for the ``tries``-th time."""

    workflow_id: int
    step_id: str
    tries: int
    output: str | None


def hand_off_failed(session: Session, task_id: str, *, error: str, interval: float) -> BrokenHandOff | None:
    """Note why a hand-off did not work, to be repeated in ``interval`` seconds; None where it is done already."""
    row = session.row("steps.hand_off_failed", {"task_id": task_id, "error": error, "interval": interval})
    return BrokenHandOff(*row) if row else None


def give_up_hand_off(session: Session, task_id: str) -> int | None:
    """End a hand-off that cannot work; the step stays SUCCESS with its error, for ``resume``."""
    row = session.row("steps.give_up_hand_off", {"task_id": task_id})
    return row[0] if row else None


def peek(session: Session, task_id: str) -> Peeked | None:
    """Return one step as it stands."""
    return session.one(Peeked, "steps.peek", {"task_id": task_id})


def claim_due(
    session: Session,
    *,
    app: str,
    may_judge: bool,
    batch: int,
    max_lost: int,
    poison: str,
    interval: float,
    interval_max: float,
    back: float | None = None,
) -> list[DueStep]:
    """Take what is due; whoever asks next does not find it due any more.

    ``may_judge`` says whether the end of a lease may be believed; that of a worker declared dead always is.
    ``back`` leaves out what has been due for more than so many seconds.
    """
    return session.many(
        DueStep,
        "steps.claim_due",
        {
            "app": app,
            "may_judge": may_judge,
            "batch": batch,
            "max_lost": max_lost,
            "poison": poison,
            "interval": interval,
            "interval_max": interval_max,
            "back": back,
        },
    )


def resent(session: Session, task_ids: Sequence[str]) -> None:
    """Note that messages have been published again just now."""
    session.run("steps.resent", {"task_ids": list(task_ids)})


def unsent(session: Session, task_ids: Sequence[str], *, interval: float) -> None:
    """Note that the broker did not take these messages; they are due again after ``interval`` seconds."""
    session.run("steps.unsent", {"task_ids": list(task_ids), "interval": interval})


def next_due(session: Session, *, app: str, may_judge: bool, back: float | None = None) -> float | None:
    """Return the seconds until something is due (negative: since when), or None; ``back`` as in ``claim_due``."""
    row = session.row("steps.next_due", {"app": app, "may_judge": may_judge, "back": back})
    return row[0] if row else None


def renew(session: Session, task_ids: Iterable[str], *, worker_id: UUID, lease: float) -> set[str]:
    """Extend the leases of what a worker holds; returns those of its steps that others are running now."""
    rows = session.rows(
        "steps.renew", {"task_ids": list(task_ids), "worker_id": worker_id, "lease": lease, "commit": ASYNC}
    )
    return {row[0] for row in rows}


def release(session: Session, *, app: str, worker_id: UUID) -> int:
    """Give back, uncounted, everything a stopping worker was executing or handing off."""
    return session.run("steps.release", {"app": app, "worker_id": worker_id})


def requeue(session: Session, task_ids: Iterable[str]) -> int:
    """Make due what a stopping worker had received without beginning it."""
    return session.run("steps.requeue", {"task_ids": list(task_ids)})


def expire(session: Session, *, app: str, worker_id: UUID, max_lost: int, poison: str) -> int:
    """Queue again what a dead worker was executing, and make due what it was handing off."""
    return session.run("steps.expire", {"app": app, "worker_id": worker_id, "max_lost": max_lost, "poison": poison})


def move_owner(session: Session, *, app: str, old_id: UUID, new_id: UUID) -> None:
    """Take along what a worker was executing under its former incarnation."""
    session.run("steps.move_owner", {"app": app, "old_id": old_id, "new_id": new_id})


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
