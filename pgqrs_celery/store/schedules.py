"""Schedules: the rows from which recurring runs are started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.session import Session

__all__ = ["DueSchedule", "NewSchedule", "advance", "claim", "next_due", "now", "put", "remove"]


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """A schedule to be entered; ``args`` is JSON text."""

    app: str
    name: str
    workflow: str
    cron: str
    zone: str
    args: str
    catch_up: bool
    overlap: bool
    next_fire_at: datetime | None


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A locked schedule whose time has come; ``busy`` says that its last run has not ended."""

    name: str
    workflow: str
    cron: str
    zone: str
    args: str
    catch_up: bool
    overlap: bool
    next_fire_at: datetime
    last_run: int | None
    now: datetime
    busy: bool


def now(session: Session) -> datetime:
    """Return the database's time."""
    row = session.row("schedules.now")
    if row is None:
        raise StoreError("the database does not know what time it is")
    moment: datetime = row[0]
    return moment


def put(session: Session, new: NewSchedule) -> None:
    """Enter a schedule, or change the one that has the name."""
    session.run("schedules.put", {name: getattr(new, name) for name in new.__slots__})


def remove(session: Session, *, app: str, name: str) -> bool:
    """Forget a schedule; False where there is none. Runs it has started are not touched."""
    return session.row("schedules.remove", {"app": app, "name": name}) is not None


def claim(session: Session, *, app: str, workflows: Sequence[str]) -> DueSchedule | None:
    """Lock one schedule that is due, in the caller's transaction; what others have locked is passed over."""
    return session.one(DueSchedule, "schedules.claim", {"app": app, "workflows": list(workflows)})


def advance(
    session: Session, *, app: str, name: str, fired_at: datetime, next_fire_at: datetime | None, run: int | None
) -> None:
    """Enter when a locked schedule fires next, in the transaction that has started its run."""
    session.run(
        "schedules.advance",
        {"app": app, "name": name, "fired_at": fired_at, "next_fire_at": next_fire_at, "run": run},
    )


def next_due(session: Session, *, app: str, workflows: Sequence[str]) -> float | None:
    """Return the seconds until a schedule is due, None where none ever is."""
    row = session.row("schedules.next_due", {"app": app, "workflows": list(workflows)})
    return row[0] if row else None
