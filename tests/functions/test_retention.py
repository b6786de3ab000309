"""Of a run that was pruned nothing is left, in whatever table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from celery import chord, group
from psycopg import sql

from pgqrs_celery import Pgqrs
from pgqrs_celery.housekeeping import Housekeeping
from pgqrs_celery.store import schedules, waiters
from pgqrs_celery.store.schedules import NewSchedule
from tests.functions.conftest import Working, ended
from tests.support.waiting import wait_for

MARK = "gone-with-its-run"


@pytest.fixture
def pgqrs(new_pgqrs: Callable[..., Pgqrs], database_dsn: str, installed_schema: str) -> Pgqrs:
    """Everything on one Postgres."""
    url = f"pgqrs+{database_dsn}{'&' if '?' in database_dsn else '?'}pgqrs_schema={installed_schema}"
    return new_pgqrs(broker_url=url, result_backend=url, result_expires=None)


class Tables:
    """All tables of a schema."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.dsn, self.schema = dsn, schema

    def mentioning(self, *texts: str) -> dict[str, list[str]]:
        """Return the rows, by table, in which any of these texts occurs."""
        found: dict[str, list[str]] = {}
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            names = connection.execute(
                "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", [self.schema]
            ).fetchall()
            for (name,) in names:
                query = sql.SQL("SELECT to_jsonb(t)::text FROM {} t").format(sql.Identifier(self.schema, name))
                rows = [row for (row,) in connection.execute(query) if any(text in row for text in texts)]
                if rows:
                    found[name] = rows
        return found


def test_of_a_run_that_was_pruned_nothing_is_left_in_any_table(
    pgqrs: Pgqrs, working: Working, database_dsn: str, installed_schema: str
) -> None:
    @pgqrs.task(shared=False)
    def echo(value: Any) -> Any:
        return value

    @pgqrs.step
    def part(ctx: Any, value: str) -> str:
        return ctx.step("inner", lambda: value)

    leaf = pgqrs.workflow("leaf", echo.s())

    @pgqrs.workflow
    def tree(ctx: Any, value: str) -> Any:
        ctx.sleep("nap", seconds=0.1)
        ctx.gather(part.s(value), part.s(value))
        ctx.wait(ctx.start_child(leaf, value))
        return ctx.wait_for_event("go")

    fan = pgqrs.workflow("fan", chord(group(echo.s(MARK), echo.s(MARK)), echo.s()))
    many = pgqrs.workflow("many", group(echo.s(MARK), echo.s(MARK)))
    tables = Tables(database_dsn, installed_schema)
    with working():
        trees = [tree.delay(MARK), tree.delay("kept")]
        for run in trees:
            wait_for(lambda run=run: "go" in {s.step_id for s in run.steps()}, 60, "the function to wait")
        pgqrs.emit(trees[0], "go", MARK)
        runs = [trees[0], fan.delay(), many.delay()]
        for run in runs:
            ended(run).get(timeout=60)
        saved = runs[2].result
        saved.save()  # type: ignore[union-attr]
    children = [run for run in pgqrs.monitor.runs(name="leaf") if MARK in str(run.input)]
    ids = {step.task_id for run in runs for step in run.steps()} | {run.record.root_id for run in runs}
    ids |= {child.root_id for child in children}
    texts = [MARK, *(task_id for task_id in ids if task_id)]

    def leave_traces(session: Any) -> None:
        waiters.register(session, "kept-by-a-dead-process", ["another task", str(runs[0].record.root_id)])
        new = NewSchedule(pgqrs.ledger.app, "nightly", "tree", "0 0 * * *", "UTC", "[]", False, True, None)
        schedules.put(session, new)
        schedules.advance(
            session, app=pgqrs.ledger.app, name="nightly", next_fire_at=None, fired_at=schedules.now(session),
            run=runs[0].id,
        )  # fmt: skip

    pgqrs.ledger.call(leave_traces)
    before = tables.mentioning(*texts)
    assert before.keys() >= {
        "pgqrs_workflows", "pgqrs_workflow_steps", "pgqrs_events", "pgqrs_task_results", "pgqrs_groups",
        "pgqrs_chords", "pgqrs_waiters",
    }  # fmt: skip
    own = f'"workflow_id": {trees[1].id},'
    kept = {name: len(rows) for name, rows in tables.mentioning(own).items()}
    housekeeping = Housekeeping(pgqrs.ledger)
    while housekeeping.batch(0.0):
        pass
    assert tables.mentioning(*texts, *(f'"workflow_id": {run.id},' for run in runs)) == {}
    assert tables.mentioning(f'"last_run": {runs[0].id},') == {}
    assert {name: len(rows) for name, rows in tables.mentioning(own).items()} == kept
    assert len(tables.mentioning("kept-by-a-dead-process")["pgqrs_waiters"]) == 1
