"""Results of tasks and groups: the statements of ``results.sql``.

A result is one row per task id. The first SUCCESS wins: nothing overwrites it until it expires, so a late copy of a
task, or a worker that was taken for dead, cannot change what was reported. Expired rows are invisible at once and
removed later, in batches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from pgqrs_celery.prepared import bytea
from pgqrs_celery.session import Session
from pgqrs_celery.store import waiters
from pgqrs_celery.store.payloads import NOTHING, Payload

__all__ = [
    "FAILED_STATES",
    "LAST",
    "Outcome",
    "Part",
    "Result",
    "fetch",
    "fetch_group",
    "fetch_many",
    "forget",
    "forget_failures",
    "forget_group",
    "outcome_statement",
    "prune",
    "save_group",
    "store",
    "store_and_wake",
    "store_cursor",
    "store_with_part",
]

FAILED_STATES: Final = frozenset({"FAILURE", "REVOKED"})

#: Where a member has no place of its own in the header; sorts last.
LAST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Result:
    """A stored result: ``payload`` is Celery's whole result meta."""

    task_id: str
    status: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Part:
    """What one member of a chord's header returned; ``idx`` is its place.

    ``told`` is a JSON list of the errbacks that have been called because of its failure, so that the same ones need not
    be called for the body.
    """

    chord_id: str
    idx: int
    task_id: str
    status: str
    payload: Payload
    told: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the chord cannot go on with this."""
        return self.status in FAILED_STATES


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything a finished task leaves behind: its result, its chord part, either or both.

    ``expires`` is the result's lifetime in seconds; None keeps it.
    """

    task_id: str
    status: str
    result: Payload = NOTHING
    expires: float | None = None
    part: Part | None = None
    #: Whether nobody needs to wait for the task after this.
    final: bool = True

    def params(self) -> dict[str, Any]:
        """Return the parameters of ``store`` and ``store_with_part``."""
        values = {"task_id": self.task_id, "status": self.status, "expires": self.expires, **self.result.columns()}
        if self.part is not None:
            part = self.part
            values |= {"chord_id": part.chord_id, "part_idx": part.idx, "part_status": part.status}
            values["part_told"] = part.told
            values |= part.payload.columns("part_")
        return values


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows a ``prune`` removed, by what they were."""

    results: int = 0
    groups: int = 0
    chords: int = 0
    waiters: int = 0
    #: Whether a batch was full, so that there may be more.
    more: bool = field(default=False, compare=False)

    @property
    def total(self) -> int:
        """All of them."""
        return self.results + self.groups + self.chords + self.waiters


def store(session: Session, outcome: Outcome) -> bool:
    """Keep a result without a chord part; False where the task already had a SUCCESS."""
    return session.run("results.store", outcome.params()) == 1


def store_and_wake(session: Session, outcome: Outcome) -> None:
    """Keep a result without a chord part, commit, then tell its waiters, all in one statement.

    Not for use inside a transaction: it ends one, and begins another.
    """
    session.quickly("results.store_and_wake", {**outcome.params(), "final": outcome.final})


@cache
def outcome_statement(text: str, accepted: str) -> bytes:
    """Return ``results.store_with_part`` with its condition filled in."""
    return text.replace("{accepted}", accepted).encode()


def store_with_part(
    session: Session, outcome: Outcome, *, accepted: str | None = None, params: Mapping[str, Any] | None = None
) -> bool:
    """Keep a result and its chord part, all or nothing, if ``accepted`` yields a row; False where it does not.

    ``accepted`` is the text of a statement (``session.text``) that becomes the first CTE; without one, the condition is
    that the chord is known. It may itself write: the hand-off of a durable step is ``UPDATE … WHERE task_id = … AND
    <mine> RETURNING …`` there, and the result and the part hang on what it returns. Its parameters are ``params``; it
    must yield one row at most. Of one member's parts a success replaces a failure, never the reverse.
    """
    return store_cursor(session, outcome, accepted=accepted, params=params).fetchone()[0] is True


def store_cursor(
    session: Session, outcome: Outcome, *, accepted: str | None = None, params: Mapping[str, Any] | None = None
) -> Any:
    """Send the statement of ``store_with_part`` and return its cursor, to be read once a pipeline has been flushed."""
    nothing = {"chord_id": None, "part_idx": 0, "part_status": None, "part_told": None, **NOTHING.columns("part_")}
    values = nothing | outcome.params()
    text = outcome_statement(session.text("results.store_with_part"), accepted or session.text("chords.known"))
    return session.connection.execute(text, {**(params or {}), **values})


def fetch(session: Session, task_id: str) -> Result | None:
    """Return the result of a task, or None."""
    row = session.quick_row("results.fetch", {"task_id": task_id})
    if row is None:
        return None
    status, data, body, content = row
    payload = Payload(
        None if data is None else data.decode(),
        None if body is None else bytea(body),
        None if content is None else content.decode(),
    )
    return Result(task_id, (status or b"").decode(), payload)


def fetch_many(session: Session, task_ids: Collection[str]) -> list[Result]:
    """Return those results that exist, in no order, with one statement."""
    if len(task_ids) == 1:
        (task_id,) = task_ids
        found = fetch(session, task_id)
        return [found] if found is not None else []
    rows = session.rows("results.fetch_many", {"task_ids": list(task_ids)})
    return [Result(row[0], row[1], Payload(*row[2:])) for row in rows]


def forget(session: Session, task_id: str) -> None:
    """Remove a result."""
    session.run("results.forget", {"task_id": task_id})


def forget_failures(session: Session, task_ids: Collection[str]) -> int:
    """Remove the failures (not the successes) of tasks that are going to run again; return how many there were."""
    return session.run("results.forget_failures", {"task_ids": list(task_ids)})


def save_group(session: Session, group_id: str, payload: Payload, expires: float | None) -> None:
    """Keep a group's structure."""
    session.run("results.save_group", {"group_id": group_id, "expires": expires, **payload.columns()})


def fetch_group(session: Session, group_id: str) -> Payload | None:
    """Return what ``save_group`` kept, or None."""
    row = session.row("results.fetch_group", {"group_id": group_id})
    return None if row is None else Payload(*row)


def forget_group(session: Session, group_id: str) -> None:
    """Remove a saved group."""
    session.run("results.forget_group", {"group_id": group_id})


def prune(session: Session, limit: int = 500) -> Pruned:
    """Remove one batch of everything that has expired; each statement is a short transaction of its own.

    Rows that another process is removing at the moment are passed over, so any number of workers may prune. A chord's
    header can have many parts, therefore chords go in smaller batches.
    """
    few = max(1, limit // 50)
    results = session.run("results.prune", {"limit": limit})
    groups = session.run("results.prune_groups", {"limit": limit})
    row = session.row("chords.prune", {"limit": few})
    chords = int(row[0]) if row else 0
    stale = waiters.prune(session, limit)
    full = results == limit or groups == limit or chords == few or stale == limit
    return Pruned(results, groups, chords, stale, full)
