"""Runs that consumers take and execute themselves: the ledger is their queue, no broker is involved.

The function's row has no message, so that no relay can send it; ``due_at`` says when a consumer may take it: at once
where it waits, after the lease where a consumer has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.session import Session
from pgqrs_celery.store import runs
from pgqrs_celery.store.inner import Owner
from pgqrs_celery.store.recording import NewStep
from pgqrs_celery.store.runs import NewRun

__all__ = ["Claim", "archive", "claim", "define", "enqueue", "is_defined", "release", "renew"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A run in the hands of a consumer; ``input`` is JSON text."""

    workflow_id: int
    app: str
    task_id: str
    step_id: str
    lease_token: UUID
    generation: int
    attempt: int
    name: str
    input: str | None
    claimed_at: datetime

    @property
    def owner(self) -> Owner:
        """What every fenced write of the consumer needs."""
        return Owner(self.workflow_id, self.app, self.task_id, str(self.lease_token), self.generation)


def define(session: Session, *, app: str, name: str) -> bool:
    """Enter a workflow's name; False where it was there."""
    return bool(session.run("consumed.define", {"app": app, "name": name}))


def is_defined(session: Session, *, app: str, name: str) -> bool:
    """Return whether a workflow's name has been entered."""
    return session.row("consumed.defined", {"app": app, "name": name}) is not None


def enqueue(session: Session, run: NewRun) -> int:
    """Enter a run for the consumers of its workflow's queue and return its id.

    The same root id again is the same run: the answer of the first commit may have been lost.
    """
    step = NewStep(run.root_id, f"{run.name}()", run.name, 0, None, run.name, 0.0, sent=False, kind="function")
    started = runs.start(session, run, [step])
    if started is not None:
        return started[0]
    found = runs.find(session, root_id=run.root_id)
    if found is None:
        raise StoreError(f"run {run.name!r} was neither entered nor found: it was removed at this moment")
    return found.workflow_id


def claim(
    session: Session, *, app: str, queue: str, worker_id: UUID, batch: int, lease: float, max_lost: int, poison: str
) -> list[Claim]:
    """Take up to ``batch`` runs for ``lease`` seconds; those that killed their consumers too often fail instead."""
    where = {"app": app, "queue": queue}
    for (failed,) in session.rows("consumed.poison", {**where, "max_lost": max_lost, "error": poison}):
        runs.close_if_quiet(session, failed)
    taken = session.many(Claim, "consumed.claim", {**where, "worker_id": worker_id, "batch": batch, "lease": lease})
    for one in taken:
        runs.touch(session, one.workflow_id)
    return taken


def renew(session: Session, claims: Sequence[Claim], *, lease: float) -> set[str]:
    """Extend the leases of what a consumer has; returns the task ids that are still its own."""
    rows = session.rows(
        "consumed.renew",
        {
            "task_ids": [one.task_id for one in claims],
            "lease_tokens": [one.lease_token for one in claims],
            "lease": lease,
        },
    )
    return {task_id for (task_id,) in rows}


def archive(session: Session, owner: Owner) -> bool:
    """Never deliver a run again; False where another consumer has it."""
    return session.row("consumed.archive", owner.params()) is not None


def release(session: Session, owner: Owner) -> bool:
    """Give a run back to the queue; False where it has ended, or another consumer has it."""
    return session.row("consumed.release", owner.params()) is not None
