"""Runs, steps and workers as a reader sees them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

__all__ = ["RunRecord", "StepRecord", "WorkerRecord"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as a reader sees it; the payloads are JSON text."""

    workflow_id: int
    app: str
    root_id: str
    workflow_key: str | None
    name: str
    status: str
    paused_at: datetime | None
    input: str | None
    output: str | None
    error: str | None
    result: str | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    completed_at: datetime | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as a reader sees it; ``worker`` is a host and pid, the payloads are JSON text."""

    workflow_id: int
    step_id: str
    task_id: str | None
    task_name: str
    kind: str
    status: str
    open: bool
    attempt: int
    lost: int
    handoffs: int
    fence: int
    worker_id: UUID | None
    worker: str | None
    queue: str | None
    due_at: datetime | None
    input: str | None
    output: str | None
    error: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One incarnation of a worker; ``seen_ago`` is in seconds, by the database's clock."""

    worker_id: UUID
    app: str
    hostname: str
    pid: int
    started_at: datetime
    seen_at: datetime
    stopped_at: datetime | None
    seen_ago: float
    running: int
