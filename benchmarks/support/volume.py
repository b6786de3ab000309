"""A ledger with a past: very many finished runs, many steps that wait, entered in one go."""

from __future__ import annotations

import json
from typing import Any, cast

from pgqrs_celery.session import Session
from pgqrs_celery.store.statements import quote_identifier

__all__ = ["analyze", "fill"]

#: A message of a realistic size.
MESSAGE = json.dumps({"name": "shop.pack", "headers": {"id": "x" * 36}, "body": "y" * 400})

RUNS = """
INSERT INTO {schema}.pgqrs_workflows (app, root_id, name, status, created_at, updated_at, started_at, completed_at)
SELECT 'shop', %(prefix)s || n, 'pack', CASE WHEN %(finished)s THEN 'SUCCESS' ELSE 'RUNNING' END,
       at, at, at, CASE WHEN %(finished)s THEN at END
  FROM (SELECT n, {schema}.pgqrs_now() - interval '2 days' + n * interval '10 ms' AS at
          FROM generate_series(1, %(runs)s::int) AS n) AS r
"""

STEPS = """
INSERT INTO {schema}.pgqrs_workflow_steps
       (workflow_id, step_id, app, task_id, task_name, status, open, attempt, fence, message, queue, output,
        due_at, sent_at, created_at, started_at, completed_at, updated_at)
SELECT w.workflow_id, 'pack#' || m, 'shop', w.root_id || '-' || m, 'shop.pack',
       CASE WHEN %(finished)s THEN 'SUCCESS' ELSE 'QUEUED' END, NOT %(finished)s, %(finished)s::int, %(finished)s::int,
       CASE WHEN %(finished)s THEN NULL ELSE %(message)s END::json, 'celery',
       CASE WHEN %(finished)s THEN '42' END::json,
       CASE WHEN %(finished)s THEN NULL ELSE {schema}.pgqrs_now() + interval '1 hour' + m * interval '1 s' END,
       w.created_at, w.created_at, w.started_at, w.completed_at, w.updated_at
  FROM {schema}.pgqrs_workflows w, generate_series(1, %(steps)s::int) AS m
 WHERE w.root_id LIKE %(prefix)s || '%%'
"""


def fill(session: Session, schema: str, *, prefix: str, runs: int, steps: int, finished: bool) -> None:
    """Enter runs of so many steps each: all finished, or all waiting for the next hour."""
    values = {"prefix": prefix, "runs": runs, "steps": steps, "finished": finished, "message": MESSAGE}
    for statement in (RUNS, STEPS):
        text = statement.replace("{schema}", quote_identifier(schema))
        session.connection.execute(cast("Any", text), values, prepare=False)


def analyze(session: Session, schema: str) -> None:
    """Bring visibility map and statistics up to date, as autovacuum does in time."""
    for table in ("pgqrs_workflows", "pgqrs_workflow_steps", "pgqrs_workers"):
        session.connection.execute(f"VACUUM ANALYZE {quote_identifier(schema)}.{table}".encode(), prepare=False)
