"""Schedules: rows in Postgres, ticked by any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from celery import Celery

from pgqrs_celery import ConfigurationError, Pgqrs
from pgqrs_celery.compat.underway import Cron, InvalidInput, StepContext, To, Workflow
from pgqrs_celery.compat.underway_scheduler import tick
from tests.support.waiting import wait_for


@pytest.fixture
def pgqrs(database_dsn: str, installed_schema: str, redis_url: str) -> Iterator[Pgqrs]:
    app = Celery("schedule-tests", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema, broker_connection_retry_on_startup=True)
    made = Pgqrs(app)
    yield made
    made.ledger.database.close()
    app.close()


def clean(cx: StepContext, tenant: int) -> To:
    return To.done(tenant)


@pytest.fixture
def workflow(pgqrs: Pgqrs) -> Workflow:
    return Workflow.builder().app(pgqrs).step(clean).name("cleanup").build()


@pytest.fixture
def rows(database_dsn: str, installed_schema: str) -> Iterator[Any]:
    """Run a statement on the schedules and return what it answers."""
    with psycopg.connect(database_dsn, autocommit=True) as connection:
        connection.execute(f"SET search_path TO {installed_schema}")

        def ask(statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
            cursor = connection.execute(statement, parameters)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

        yield ask


def ticks(pgqrs: Pgqrs) -> list[int]:
    """Tick until nothing is due."""
    return list(iter(lambda: tick(pgqrs), None))  # type: ignore[arg-type]


def make_due(rows: Any, ago: str = "1 second") -> None:
    rows(f"UPDATE pgqrs_schedules SET next_fire_at = now() - interval '{ago}'")


def test_a_schedule_fires_at_its_time_and_not_before(pgqrs: Pgqrs, workflow: Workflow, rows: Any) -> None:
    workflow.schedule("0 2 * * *[Europe/Berlin]", 7)
    [(following,)] = rows("SELECT next_fire_at FROM pgqrs_schedules")
    assert following == Cron.parse("0 2 * * *[Europe/Berlin]").after(datetime.now(UTC))
    assert ticks(pgqrs) == []
    make_due(rows)
    [run] = ticks(pgqrs)
    assert ticks(pgqrs) == []
    [(key, text)] = rows("SELECT workflow_key, input::text FROM pgqrs_workflows WHERE workflow_id = %s", run)
    [(last, last_run, following_again)] = rows("SELECT last_fire_at, last_run, next_fire_at FROM pgqrs_schedules")
    assert key == f"cleanup/{last.astimezone(UTC).isoformat()}"
    assert '{"next": 7}' in text
    assert (last_run, following_again) == (run, following)


def test_of_many_that_tick_at_once_one_starts_the_run(pgqrs: Pgqrs, workflow: Workflow, rows: Any) -> None:
    for number in range(5):
        workflow.schedule("0 2 * * *", number, name=f"tenant-{number}")
    for _ in range(4):
        make_due(rows)
        with ThreadPoolExecutor(6) as threads:
            started = [run for found in threads.map(lambda _: ticks(pgqrs), range(6)) for run in found]
        assert len(started) == len(set(started)) == 5
    assert rows("SELECT count(*) FROM pgqrs_workflows") == [(20,)]


def test_missed_times_get_one_run_or_one_each(pgqrs: Pgqrs, workflow: Workflow, rows: Any) -> None:
    workflow.schedule("@hourly", 1)
    make_due(rows, "5 hours")
    assert len(ticks(pgqrs)) == 1
    workflow.schedule("@hourly", 1, catch_up=True)
    make_due(rows, "5 hours")
    assert len(ticks(pgqrs)) in (5, 6)


def test_a_schedule_may_pass_over_a_time_while_its_last_run_goes_on(
    pgqrs: Pgqrs, workflow: Workflow, rows: Any
) -> None:
    workflow.schedule("@hourly", 1, overlap=False)
    make_due(rows)
    [run] = ticks(pgqrs)
    make_due(rows)
    assert ticks(pgqrs) == [0]
    workflow.run(run).cancel()
    make_due(rows)
    [another] = ticks(pgqrs)
    assert another not in (0, run)


def test_a_schedule_made_in_a_transaction_exists_if_that_commits(
    pgqrs: Pgqrs, workflow: Workflow, rows: Any, database_dsn: str
) -> None:
    with psycopg.connect(database_dsn) as connection:
        workflow.schedule_using(connection, "@daily", 7)
        connection.rollback()
        assert rows("SELECT name FROM pgqrs_schedules") == []
        workflow.schedule_using(connection, "@daily", 7, name="kept")
    assert rows("SELECT name FROM pgqrs_schedules") == [("kept",)]
    assert workflow.unschedule() is False
    assert workflow.unschedule("kept") is True
    assert rows("SELECT name FROM pgqrs_schedules") == []


def test_a_wrong_schedule_is_refused_where_it_is_given(workflow: Workflow, rows: Any) -> None:
    with pytest.raises(InvalidInput):
        workflow.schedule("@daily", "seven")
    with pytest.raises(ConfigurationError, match="time zone"):
        workflow.schedule("0 2 * * *[Nowhere]", 7)
    assert rows("SELECT name FROM pgqrs_schedules") == []


def test_a_worker_starts_and_executes_what_is_due(workflow: Workflow, rows: Any) -> None:
    workflow.schedule("* * * * * *", 7)
    handle = workflow.runtime().start()
    try:
        wait_for(lambda: len(rows("SELECT 1 FROM pgqrs_workflows WHERE status = 'SUCCESS'")) >= 3, 60, "three runs")
    finally:
        assert workflow.unschedule()
        assert handle.shutdown(60)
    keys = [key for (key,) in rows("SELECT workflow_key FROM pgqrs_workflows")]
    assert len(keys) == len(set(keys))


def test_a_tick_that_cannot_be_finished_has_started_nothing(pgqrs: Pgqrs, workflow: Workflow, rows: Any) -> None:
    """The run and the schedule's next time are one transaction: what ends it ends both."""
    workflow.schedule("@hourly", 7)
    make_due(rows)
    before = rows("SELECT next_fire_at, last_run FROM pgqrs_schedules")
    rows("ALTER TABLE pgqrs_schedules ADD CONSTRAINT stop CHECK (last_run IS NULL)")
    with pytest.raises(Exception, match="stop"):
        tick(pgqrs)
    assert rows("SELECT 1 FROM pgqrs_workflows") == []
    assert rows("SELECT next_fire_at, last_run FROM pgqrs_schedules") == before
    rows("ALTER TABLE pgqrs_schedules DROP CONSTRAINT stop")
    assert len(ticks(pgqrs)) == 1
