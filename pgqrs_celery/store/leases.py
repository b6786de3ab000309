"""Leases: what a worker holds, kept while it lives and given back when it stops or dies."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from pgqrs_celery.session import Session

__all__ = ["expire", "move_owner", "release", "renew", "requeue"]


def renew(session: Session, task_ids: Iterable[str], *, worker_id: UUID, lease: float) -> set[str]:
    """Extend the leases of what a worker holds; returns those of its steps that others are running now."""
    rows = session.rows("leases.renew", {"task_ids": list(task_ids), "worker_id": worker_id, "lease": lease})
    return {row[0] for row in rows}


def release(session: Session, *, app: str, worker_id: UUID) -> int:
    """Give back, uncounted, everything a stopping worker was executing or handing off."""
    return session.run("leases.release", {"app": app, "worker_id": worker_id})


def requeue(session: Session, task_ids: Iterable[str]) -> int:
    """Make due what a stopping worker had received without beginning it."""
    return session.run("leases.requeue", {"task_ids": list(task_ids)})


def expire(session: Session, *, app: str, worker_id: UUID, max_lost: int, poison: str) -> int:
    """Queue again what a dead worker was executing, and make due what it was handing off."""
    return session.run("leases.expire", {"app": app, "worker_id": worker_id, "max_lost": max_lost, "poison": poison})


def move_owner(session: Session, *, app: str, old_id: UUID, new_id: UUID) -> None:
    """Take along what a worker was executing under its former incarnation."""
    session.run("leases.move_owner", {"app": app, "old_id": old_id, "new_id": new_id})
