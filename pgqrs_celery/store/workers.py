"""Workers: incarnations, their session locks, and the watermarks of what they have received."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pgqrs_celery.session import Session

__all__ = ["Neighbour", "beat", "neighbours", "register", "stop", "try_lock", "watermarks"]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another worker of the app.

    ``free``: nobody held its session lock just now. ``certain``: the server has kept all locks since this one was
    taken, so that a free one was given up; else a restart may have freed it.
    """

    worker_id: UUID
    lock_key: int
    free: bool
    certain: bool


def lock_key(worker_id: UUID) -> int:
    """Return the advisory lock key of an incarnation: the first 64 bits of its id."""
    return int.from_bytes(worker_id.bytes[:8], "big", signed=True)


def register(session: Session, worker_id: UUID, *, app: str, hostname: str, pid: int, locked: bool = True) -> None:
    """Enter a new incarnation, with its session lock: the session must live as long as the worker.

    Without a session of its own it is not ``locked``, and nobody watches it.
    """
    if locked:
        session.row("workers.lock", {"key": lock_key(worker_id)})
    session.run(
        "workers.register", {"worker_id": worker_id, "app": app, "hostname": hostname, "pid": pid, "locked": locked}
    )


def beat(session: Session, worker_id: UUID, received: Mapping[str, datetime]) -> None:
    """Note a sign of life, and per queue the newest send time received."""
    stamps = {queue: at.isoformat() for queue, at in received.items()}
    session.run("workers.beat", {"worker_id": worker_id, "watermarks": json.dumps(stamps)})


def stop(session: Session, worker_id: UUID) -> None:
    """Note that an incarnation has ended."""
    session.run("workers.stop", {"worker_id": worker_id})


def neighbours(session: Session, worker_id: UUID, *, app: str, limit: int) -> list[Neighbour]:
    """Return the next workers after this one in ring order: everybody is watched by somebody, at constant cost."""
    return session.many(Neighbour, "workers.neighbours", {"worker_id": worker_id, "app": app, "limit": limit})


def try_lock(session: Session, key: int) -> bool:
    """Take a worker's lock until the end of the transaction; False where the worker is alive."""
    row = session.row("workers.try_lock", {"key": key})
    return bool(row and row[0])


def watermarks(session: Session, *, app: str) -> dict[str, datetime]:
    """Return, per queue, the newest send time any recent worker of the app has received."""
    return dict(session.rows("workers.watermarks", {"app": app}))


def forget(session: Session, *, app: str) -> None:
    """Remove incarnations that ended a week ago."""
    session.run("workers.forget", {"app": app})
