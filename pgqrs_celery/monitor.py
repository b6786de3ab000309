"""The read side: runs and steps for the Python API, the command line and web pages.

Queries are SQLAlchemy Core. They take no locks and may be answered by a read replica.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from pgqrs_celery.db import Database, translate
from pgqrs_celery.store.statements import quote_identifier

__all__ = ["Monitor", "RunRecord", "StepRecord", "WorkerRecord"]


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


def _table(metadata: sa.MetaData, name: str, columns: Sequence[str], types: dict[str, Any]) -> sa.Table:
    return sa.Table(name, metadata, *(sa.Column(c, types.get(c, sa.Text())) for c in columns))


class Monitor:
    """Queries about one schema."""

    def __init__(self, database: Database) -> None:
        self._engine = sa.create_engine(
            "postgresql+psycopg://",
            creator=lambda: database.connect(autocommit=False),
            poolclass=NullPool,
        )
        self._schema = database.schema
        metadata = sa.MetaData(schema=database.schema)
        times = dict.fromkeys(
            ("paused_at", "created_at", "updated_at", "started_at", "completed_at", "due_at", "seen_at", "stopped_at"),
            sa.DateTime(timezone=True),
        )
        numbers = dict.fromkeys(("attempt", "lost", "handoffs"), sa.Integer())
        types = {
            **times,
            **numbers,
            "workflow_id": sa.BigInteger(),
            "fence": sa.BigInteger(),
            "open": sa.Boolean(),
            "worker_id": sa.Uuid(),
            "pid": sa.Integer(),
        }
        self.runs_table = _table(metadata, "pgqrs_workflows", tuple(RunRecord.__slots__), types)
        self._step_columns = [c for c in StepRecord.__slots__ if c != "worker"]
        self.steps_table = _table(metadata, "pgqrs_workflow_steps", [*self._step_columns, "app"], types)
        worker_columns = [c for c in WorkerRecord.__slots__ if c not in ("seen_ago", "running")]
        self.workers_table = _table(metadata, "pgqrs_workers", worker_columns, types)
        self._now = f"{quote_identifier(database.schema)}.pgqrs_now()"

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        """Lend a connection; the driver's errors leave as ``StoreError``."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            cause = error.orig
            raise (translate(cause, self._schema) if isinstance(cause, psycopg.Error) else error) from error

    def run(self, workflow_id: int) -> RunRecord | None:
        """Return one run."""
        query = sa.select(self.runs_table).where(self.runs_table.c.workflow_id == workflow_id)
        with self._connect() as connection:
            row = connection.execute(query).one_or_none()
        return RunRecord(**row._mapping) if row else None

    def runs(
        self,
        *,
        app: str | None = None,
        status: str | None = None,
        name: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[RunRecord]:
        """Return runs, newest first; ``before`` is the last run id of the page before."""
        runs = self.runs_table
        query = sa.select(runs).order_by(runs.c.workflow_id.desc()).limit(limit)
        for column, value in ((runs.c.app, app), (runs.c.status, status), (runs.c.name, name)):
            if value is not None:
                query = query.where(column == value)
        if before is not None:
            query = query.where(runs.c.workflow_id < before)
        with self._connect() as connection:
            return [RunRecord(**row._mapping) for row in connection.execute(query)]

    def steps(self, workflow_id: int) -> list[StepRecord]:
        """Return a run's steps in the order they came."""
        steps, workers = self.steps_table, self.workers_table
        worker = (workers.c.hostname + sa.literal(" pid ") + sa.cast(workers.c.pid, sa.Text)).label("worker")
        query = (
            sa.select(*(steps.c[name] for name in self._step_columns), worker)
            .join_from(steps, workers, steps.c.worker_id == workers.c.worker_id, isouter=True)
            .where(steps.c.workflow_id == workflow_id)
            .order_by(steps.c.created_at, steps.c.started_at, steps.c.step_id)
        )
        with self._connect() as connection:
            return [StepRecord(**row._mapping) for row in connection.execute(query)]

    def outputs(self, workflow_id: int, task_ids: Sequence[str]) -> dict[str, str | None]:
        """Return the recorded results of some of a run's tasks, by task id."""
        steps = self.steps_table
        query = sa.select(steps.c.task_id, steps.c.output).where(
            steps.c.workflow_id == workflow_id, steps.c.task_id.in_(list(task_ids))
        )
        with self._connect() as connection:
            return {row.task_id: row.output for row in connection.execute(query)}

    def workers(self, *, app: str | None = None, ended: bool = False) -> list[WorkerRecord]:
        """Return the workers that have not ended (with ``ended`` also those of the last days), oldest first."""
        workers, steps = self.workers_table, self.steps_table
        running = (
            sa.select(sa.func.count())
            .where(steps.c.app == workers.c.app, steps.c.due_at.is_not(None))
            .where(steps.c.worker_id == workers.c.worker_id, steps.c.status == "RUNNING")
            .scalar_subquery()
            .label("running")
        )
        now: sa.ColumnElement[datetime] = sa.literal_column(self._now, sa.DateTime(timezone=True))
        ago = sa.cast(sa.extract("epoch", now - workers.c.seen_at), sa.Float()).label("seen_ago")
        query = sa.select(workers, ago, running).order_by(workers.c.started_at)
        if app is not None:
            query = query.where(workers.c.app == app)
        if not ended:
            query = query.where(workers.c.stopped_at.is_(None))
        with self._connect() as connection:
            return [WorkerRecord(**row._mapping) for row in connection.execute(query)]
