"""The units of work in their common form: one step, at most one message, one round trip.

Everything hangs on the step's lease token; where that is not accepted nothing is written but the end of the step's own
message, whose work somebody else does. Chord members, several messages, and messages that need the broker's bindings
take several statements in one transaction instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from pgqrs_celery.session import TRUE, Session
from pgqrs_celery.store.messages import LONGEST_LOOK, NewMessage
from pgqrs_celery.store.recording import NewStep, Recorded
from pgqrs_celery.store.recording import Outcome as Fate
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.store.runs import NewRun

__all__ = ["Finish", "Taking", "finish", "go_on", "start"]


#: What follows, where nothing does.
NOTHING: Final[dict[str, Any]] = dict.fromkeys(
    f"next_{name}" for name in ("task", "step", "name", "kind", "generation", "envelope", "queue", "delay", "sent")
)
SILENCE: Final[dict[str, Any]] = dict.fromkeys(
    ("message_id", "queue", "priority", "ttl", "headers", "properties", "message_body")
)


@dataclass(frozen=True, slots=True)
class Finish:
    """What became of a unit: whether it counts, what was recorded, and whether its run is still to be closed."""

    accepted: bool
    recorded: list[Recorded]
    quiet: bool


def finish(
    session: Session,
    *,
    app: str,
    lease_token: UUID,
    output: str,
    outcome: Outcome,
    following: NewStep | None,
    message: NewMessage | None = None,
    own_message_id: UUID | None = None,
    hand_off: bool = True,
    next_worker: UUID | None = None,
) -> Finish:
    """Commit a unit, tell who waits for its result, and close its run if that has ended.

    Without ``hand_off`` the step stays open under its lease: its result is still to be stored elsewhere. What follows
    is noted as received by ``next_worker``, if there is one.
    Not inside a transaction: it ends one and begins others. A run that a function waits for is left to be closed.
    """
    params = {
        **outcome.params(),
        **(_following(following) if following else NOTHING),
        **(_message(message) if message else SILENCE),
        "app": app,
        "lease_token": lease_token,
        "output": output,
        "hand_off": hand_off,
        "next_worker": next_worker,
        "own_message_id": own_message_id,
    }
    row = session.quick_row("units.finish", params)
    assert row is not None
    status, accepted, recorded_at, quiet, closed = row
    recorded = _fate(following, status, accepted, recorded_at) if following is not None else []
    return Finish(status is not None, recorded, quiet == TRUE and closed is None)


@dataclass(frozen=True, slots=True)
class Taking:
    """Under what the sender of a step takes it itself: a token of its own, its worker, and seconds."""

    lease_token: UUID
    worker_id: UUID
    lease: float


def go_on(
    session: Session,
    *,
    app: str,
    lease_token: UUID,
    output: str,
    outcome: Outcome,
    following: NewStep,
    taking: Taking,
    own_message_id: UUID | None,
) -> tuple[Finish, bool]:
    """Commit a unit whose next step is taken by its sender, and tell who waits for its result.

    Not inside a transaction. Also returns whether the step was taken; if not, but recorded, it is due for a relay.
    """
    params = {
        **outcome.params(),
        **_following(following),
        "app": app,
        "lease_token": lease_token,
        "output": output,
        "next_token": taking.lease_token,
        "worker_id": taking.worker_id,
        "lease": taking.lease,
        "own_message_id": own_message_id,
    }
    row = session.quick_row("units.go_on", params)
    assert row is not None
    status, accepted, recorded_at, taken = row
    return Finish(status is not None, _fate(following, status, accepted, recorded_at), False), taken == TRUE


def start(
    session: Session, run: NewRun, step: NewStep, message: NewMessage, *, sent_header: str, wake: bool
) -> int | None:
    """Enter a new run with its first step, send that step's message, and return the run; None where it exists.

    The time of recording, which the database knows, is added to the message's headers as ``sent_header``. With
    ``wake``, a consumer that sleeps is handed the message, or told. Not inside a transaction. Raises ``StoreError``
    where the step's task id belongs to another run.
    """
    assert run.workflow_key is None
    params = {
        **run.params(),
        **_following(step),
        **_message(message),
        "sent_header": sent_header,
        "wake": wake,
        "look_interval": LONGEST_LOOK,
    }
    row = session.quick_row("units.start", params)
    assert row is not None
    return None if row[0] is None else int(row[0])


def _fate(
    following: NewStep, status: bytes | None, accepted: bytes | None, recorded_at: bytes | None
) -> list[Recorded]:
    fate = Fate.LOST if status is None else Fate.CANCELLED if status == b"CANCELLED" else Fate.SUPPRESS
    moment = datetime.fromtimestamp(float(recorded_at or 0), UTC)
    return [Recorded(following.task_id, Fate.SEND if accepted == TRUE else fate, moment)]


def _following(step: NewStep) -> dict[str, Any]:
    return {
        "next_task": step.task_id,
        "next_step": step.step_id,
        "next_name": step.task_name,
        "next_kind": step.kind,
        "next_generation": step.generation,
        "next_envelope": step.message,
        "next_queue": step.queue,
        "next_delay": step.delay,
        "next_sent": step.sent,
    }


def _message(message: NewMessage) -> dict[str, Any]:
    return {
        "message_id": message.message_id,
        "queue": message.routing_key,
        "priority": message.priority,
        "ttl": message.ttl,
        "headers": message.headers,
        "properties": message.properties,
        "message_body": message.body,
    }
