"""What is due: the relay's side of the ledger.

A claim changes status and clock in one statement, so that nobody else finds the row due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pgqrs_celery.session import Session

__all__ = ["DueStep", "claim_due", "next_due", "resent", "unsent"]


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
    fence: int
    #: Whether it is sent to undo what it has done.
    undoing: bool


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
        "clock.claim_due",
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
    session.run("clock.resent", {"task_ids": list(task_ids)})


def unsent(session: Session, task_ids: Sequence[str], *, interval: float) -> None:
    """Note that the broker did not take these messages; they are due again after ``interval`` seconds."""
    session.run("clock.unsent", {"task_ids": list(task_ids), "interval": interval})


def next_due(session: Session, *, app: str, may_judge: bool, back: float | None = None) -> float | None:
    """Return the seconds until something is due (negative: since when), or None; ``back`` as in ``claim_due``."""
    row = session.row("clock.next_due", {"app": app, "may_judge": may_judge, "back": back})
    return row[0] if row else None
