"""Chords: the statements of ``chords.sql``.

A chord's row is inserted before its header is sent. Each member inserts its part together with its result
(``results.store_with_part``); nothing is counted down. *After* that commit the member looks: ``peek`` without a lock,
then, if all parts seem to be in, ``look`` in a transaction of its own, which takes the row and reads the parts in the
next statement. The last member to commit sees every part, so somebody always completes the chord, and the row lock
lets only one. What happens then is the caller's business, and one of ``dispatched`` and ``failed`` closes the chord:

- durable: record the body and say ``dispatched`` in the same transaction;
- plain: ``claim``, commit, send the body, then ``dispatched``. If the sender dies in between, the claim lapses and
  ``ripe`` finds the chord again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pgqrs_celery.session import Session
from pgqrs_celery.store import results, waiters
from pgqrs_celery.store.payloads import NOTHING, Payload
from pgqrs_celery.store.results import Outcome, Part

__all__ = [
    "CLAIM",
    "Chord",
    "Look",
    "Reopened",
    "Ripe",
    "State",
    "cancelled",
    "claim",
    "delete",
    "deliver",
    "dispatched",
    "extend",
    "failed",
    "look",
    "peek",
    "place",
    "record",
    "reopen",
    "resize",
    "ripe",
]

#: How long a process may take to send the body of a plain chord before another one may, in seconds.
CLAIM: Final = 60.0


class State(StrEnum):
    """What ``look`` found."""

    #: Already closed, unknown, or its run is cancelled: nothing to do.
    CLOSED = "CLOSED"
    #: Parts are missing, or another process is sending the body.
    WAITING = "WAITING"
    #: All parts are in, and all are successes.
    COMPLETE = "COMPLETE"
    #: All parts are in, and at least one is a failure.
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Chord:
    """A chord to be recorded. ``payload`` is the body's signature and the header's shape, ``expires`` in seconds."""

    chord_id: str
    app: str
    body_id: str | None = None
    payload: Payload = NOTHING
    size: int | None = None
    expires: float | None = None
    workflow_id: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """A chord at one moment; ``parts`` only where all of them are in."""

    state: State
    workflow_id: int | None = None
    body_id: str | None = None
    payload: Payload = NOTHING
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Reopened:
    """A chord whose failed members may return once more."""

    chord_id: str
    body_id: str | None


@dataclass(frozen=True, slots=True)
class Ripe:
    """A chord that seems complete although nobody has closed it."""

    chord_id: str
    workflow_id: int | None


def record(session: Session, chord: Chord) -> None:
    """Insert a chord; a plain one that was closed before begins anew, a durable one stays as it is."""
    values = {
        "chord_id": chord.chord_id,
        "app": chord.app,
        "workflow_id": chord.workflow_id,
        "body_id": chord.body_id,
        "size": chord.size,
        "expires": chord.expires,
        **chord.payload.columns(),
    }
    session.run("chords.record", values)


def place(session: Session, chord: Chord) -> None:
    """Make sure that a row exists for a chord that nobody recorded (its header was not sent through a chord)."""
    values = {"chord_id": chord.chord_id, "app": chord.app, "size": chord.size, "expires": chord.expires}
    session.run("chords.place", values)


def resize(session: Session, chord: Chord) -> None:
    """Set the size of an open chord's header."""
    values = {"chord_id": chord.chord_id, "app": chord.app, "size": chord.size, "expires": chord.expires}
    session.run("chords.resize", values)


def extend(session: Session, chord_id: str) -> None:
    """Expect one part more."""
    session.run("chords.extend", {"chord_id": chord_id})


def deliver(session: Session, outcome: Outcome) -> bool | None:
    """Store a result and its part, commit, wake the result's waiters and peek at the chord, in one network flush.

    Returns whether the chord seems complete (an outcome without a part belongs to none); None where nothing was stored
    because there is no row for the chord. Not for use inside a transaction.
    """
    if outcome.part is None:
        results.store_and_wake(session, outcome)
        return False
    with session.flush():
        with session.committed():
            accepted = results.store_cursor(session, outcome)
        if outcome.result:
            session.send(waiters.wake_statement(outcome.final), {"task_id": outcome.task_id})
        peeked = session.send("chords.peek", {"chord_id": outcome.part.chord_id})
    if not accepted.fetchone()[0]:
        return None
    row = peeked.fetchone()
    return bool(row and row[0])


def peek(session: Session, chord_id: str) -> bool:
    """Return whether all parts seem to be in; to be called after the commit of one's own part."""
    row = session.row("chords.peek", {"chord_id": chord_id})
    return bool(row and row[0])


def look(session: Session, chord_id: str) -> Look:
    """Take the chord's row until the end of the caller's transaction, then look at its parts."""
    row = session.row("chords.lock", {"chord_id": chord_id})
    if row is None or cancelled(session, row[1]):
        return Look(State.CLOSED)
    _, workflow_id, body_id, data, body, form, size, claimed = row
    if claimed or size is None:
        return Look(State.WAITING, workflow_id, body_id)
    rows = session.rows("chords.parts", {"chord_id": chord_id})
    if len(rows) < size:
        return Look(State.WAITING, workflow_id, body_id)
    parts = tuple(Part(chord_id, row[0], row[1], row[2], Payload(*row[3:6]), row[6]) for row in rows)
    state = State.FAILED if any(part.failed for part in parts) else State.COMPLETE
    return Look(state, workflow_id, body_id, Payload(data, body, form), parts)


def cancelled(session: Session, workflow_id: int | None) -> bool:
    """Return whether the run was cancelled; a plain chord has none."""
    if workflow_id is None:
        return False
    row = session.row("chords.cancelled", {"workflow_id": workflow_id})
    return bool(row and row[0])


def claim(session: Session, chord_id: str) -> None:
    """Keep others from sending a plain chord's body for a while; in the transaction of ``look``."""
    session.run("chords.claim", {"chord_id": chord_id, "seconds": CLAIM})


def dispatched(session: Session, chord_id: str) -> bool:
    """Close a chord whose body is recorded or sent, and remove its parts; False where it was closed already."""
    return session.row("chords.dispatched", {"chord_id": chord_id}) is not None


def failed(session: Session, chord_id: str) -> bool:
    """Close a chord whose header failed; False where it was closed already."""
    return session.row("chords.failed", {"chord_id": chord_id}) is not None


def reopen(session: Session, workflow_id: int) -> list[Reopened]:
    """Let the failed header members of a run return once more; in the transaction that makes them run again."""
    found = [Reopened(*row) for row in session.rows("chords.lock_run", {"workflow_id": workflow_id})]
    if found:
        session.run("chords.reopen", {"chord_ids": [chord.chord_id for chord in found]})
    return found


def ripe(session: Session, app: str, *, durable: bool, age: float = 1.0, limit: int = 20) -> list[Ripe]:
    """Return open chords of an app that seem complete: their last finisher died before it could look or send.

    ``age`` (seconds) leaves out chords that have only just begun; ``durable`` includes those of runs.
    """
    rows = session.rows("chords.ripe", {"app": app, "durable": durable, "age": age, "limit": limit})
    return [Ripe(*row) for row in rows]


def delete(session: Session, workflow_ids: Collection[int]) -> int:
    """Remove the chords of runs that retention removes; return how many."""
    row = session.row("chords.delete", {"workflow_ids": list(workflow_ids)})
    return int(row[0]) if row else 0
