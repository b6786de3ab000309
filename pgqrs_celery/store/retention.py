"""Retention: runs that ended long ago are removed in small batches, each a transaction of its own.

This is the one place where runs are deleted, with everything that other tables know of them: events (by a foreign key),
chords, results, who waited for them, the last run of a schedule. It bounds what the ledger promises: a message older
than the retention finds no row, and is dropped because it says that it was recorded once.
"""

from __future__ import annotations

from pgqrs_celery.session import Session
from pgqrs_celery.store import chords

__all__ = ["prune_runs"]


def prune_runs(session: Session, *, app: str, age: float, limit: int = 100) -> int:
    """Remove a batch of an app's runs that ended more than ``age`` seconds ago, in the caller's transaction.

    Returns how many; as many as ``limit`` means that there may be more.
    """
    rows = session.rows("runs.prune", {"app": app, "age": age, "limit": limit})
    gone, ids = [row[0] for row in rows if row[0] is not None], sorted({row[1] for row in rows})
    if gone:
        chords.delete(session, gone)
        session.run("results.forget_many", {"ids": ids})
        session.run("waiters.forget", {"task_ids": ids})
        session.run("schedules.forget_runs", {"app": app, "workflow_ids": gone})
    return len(gone)
