"""Recording: messages become rows before they are sent.

A row is entered once; the same task id again counts only with a greater generation. The sender's own success may be
committed by the same statement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from pgqrs_celery.session import Session

__all__ = [
    "Finished",
    "NewStep",
    "Outcome",
    "Recorded",
    "await_link",
    "await_replacement",
    "record",
    "record_cursor",
    "recorded",
]

NEVER: Final = datetime.min.replace(tzinfo=UTC)


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
        "recording.record",
        {
            "messages": rows(steps),
            "finished_id": finished.task_id if finished else None,
            "output": finished.output if finished else None,
            "hand_off": finished.hand_off if finished else False,
            "workflow_id": workflow_id,
            "app": app,
            "lease_token": lease_token,
            "commit": session.durable if durable or finished else "off",
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


def await_link(session: Session, step: NewStep, *, workflow_id: int, app: str) -> None:
    """Enter a durable link that follows a plain one: its run stays open until the link's message comes."""
    session.run(
        "recording.await_link",
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
            "recording.await_replacement", {"task_id": task_id, "lease_token": lease_token, "generation": generation}
        )
    )
