"""The read side: runs and steps for the Python API, the command line and web pages.

Queries are built with SQLAlchemy Core and asked over the ledger's own connections; they take no locks. Importing this
takes nearly as long as the rest of the package together, so it is imported where somebody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy.engine import make_url

from pgqrs_celery.db import Database
from pgqrs_celery.records import RunRecord, StepRecord, WorkerRecord
from pgqrs_celery.session import Session
from pgqrs_celery.store.statements import quote_identifier

__all__ = ["Monitor"]

DIALECT: Final[sa.Dialect] = make_url("postgresql+psycopg://").get_dialect()()


def _table(metadata: sa.MetaData, name: str, columns: Sequence[str], types: dict[str, Any]) -> sa.Table:
    return sa.Table(name, metadata, *(sa.Column(c, types.get(c, sa.Text())) for c in columns))


class Monitor:
    """Queries about one schema."""

    def __init__(self, database: Database) -> None:
        self._database = database
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

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """Ask, and return the rows by the names of their columns."""
        compiled = query.compile(dialect=DIALECT, compile_kwargs={"render_postcompile": True})

        def work(session: Session) -> list[dict[str, Any]]:
            with session.connection.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(compiled.string.encode(), compiled.params).fetchall()

        return self._database.call(work)

    def run(self, workflow_id: int) -> RunRecord | None:
        """Return one run."""
        query = sa.select(self.runs_table).where(self.runs_table.c.workflow_id == workflow_id)
        rows = self._rows(query)
        return RunRecord(**rows[0]) if rows else None

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
        return [RunRecord(**row) for row in self._rows(query)]

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
        return [StepRecord(**row) for row in self._rows(query)]

    def outputs(self, workflow_id: int, task_ids: Sequence[str]) -> dict[str, str | None]:
        """Return the recorded results of some of a run's tasks, by task id."""
        steps = self.steps_table
        query = sa.select(steps.c.task_id, steps.c.output).where(
            steps.c.workflow_id == workflow_id, steps.c.task_id.in_(list(task_ids))
        )
        return {row["task_id"]: row["output"] for row in self._rows(query)}

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
        return [WorkerRecord(**row) for row in self._rows(query)]
