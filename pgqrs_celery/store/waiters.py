"""Who waits for which result: the statements of ``waiters.sql``.

Nothing is lost and nobody polls, because of the order on both sides: a waiter registers, commits, *then* reads; a
writer stores, commits, *then* looks for waiters. Whichever commits second sees the other. A NOTIFY is sent only where
somebody waits, and never in the transaction that stores the result: a NOTIFY holds a lock on the whole database until
its transaction's commit has reached the disk.

A notification carries the task's id and, where it is JSON and there is room (Postgres allows 7999 bytes), its result,
so that the waiter need not ask for it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from pgqrs_celery.db import SEPARATOR
from pgqrs_celery.prepared import array
from pgqrs_celery.session import Session

__all__ = ["ABANDONED", "cancel", "heard", "ping", "prune", "register", "wake_statement"]

#: Seconds after which a waiter that has not shown itself again counts as dead; the living do every half minute.
ABANDONED: Final = 600.0


def register(session: Session, channel: str, task_ids: Collection[str]) -> None:
    """Say, and commit, that the channel wants to hear of these tasks; also the sign that it still does.

    Not inside a transaction: what is read afterwards must see whatever was stored before this was seen.
    """
    session.quickly("waiters.register", {"channel": channel, "task_ids": array(task_ids)})


def cancel(session: Session, channel: str, task_ids: Collection[str]) -> None:
    """Take back a registration."""
    session.run("waiters.cancel", {"channel": channel, "task_ids": list(task_ids)})


def wake_statement(final: bool) -> str:
    """Return the name of the statement that tells the waiters of a task (its only parameter is ``task_id``).

    It belongs after the commit that stored the state, and can travel in the same network flush, but its own transaction
    does not wait for the disk: nothing else belongs in it that has to be there.
    """
    return "waiters.wake" if final else "waiters.nudge"


def heard(payload: str) -> tuple[str, str | None]:
    """Return the task id in a notification, up to the last separator, and its result's JSON text if that came along."""
    task_id, _, data = payload.rpartition(SEPARATOR)
    return task_id, data or None


def ping(session: Session, channel: str) -> None:
    """Send the channel an empty notification."""
    session.row("waiters.ping", {"channel": channel})


def prune(session: Session, limit: int) -> int:
    """Remove registrations of processes that died while they waited; return how many."""
    return session.run("waiters.prune", {"age": ABANDONED, "limit": limit})
