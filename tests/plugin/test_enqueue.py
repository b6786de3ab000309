"""Enqueueing in the user's own transaction."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm
from celery import Celery, chain
from psycopg.rows import dict_row

from pgqrs_celery import ConfigurationError, Pgqrs
from pgqrs_celery.store import clock


@pytest.fixture
def pgqrs(database_dsn: str, installed_schema: str, redis_url: str) -> Pgqrs:
    app = Celery("enqueue", broker=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    pgqrs = Pgqrs(app)

    @pgqrs.task(name="enqueue.charge", shared=False)
    def charge(order: int, amount: int = 1) -> int:
        return order * amount

    app.finalize()
    return pgqrs


def queue_length(pgqrs: Pgqrs) -> int:
    with pgqrs.app.connection() as connection:
        return int(connection.default_channel.queue_declare("celery").message_count)


def due(pgqrs: Pgqrs) -> list[str]:
    def claim(session):  # type: ignore[no-untyped-def]
        return clock.claim_due(
            session, app="enqueue", may_judge=True, batch=10, max_lost=5, poison="{}", interval=10.0, interval_max=60.0
        )

    return [step.task_name for step in pgqrs.ledger.call(claim)]


def test_a_run_enqueued_in_a_rolled_back_transaction_never_existed(pgqrs: Pgqrs, database_dsn: str) -> None:
    workflow = pgqrs.workflow("order", pgqrs.app.tasks["enqueue.charge"].s())
    with psycopg.connect(database_dsn) as connection:
        run = workflow.enqueue_using(connection, 42)
        connection.rollback()
    assert pgqrs.monitor.run(run.id) is None
    assert due(pgqrs) == []
    assert queue_length(pgqrs) == 0


def test_a_run_enqueued_in_a_transaction_is_due_once_that_has_committed(pgqrs: Pgqrs, database_dsn: str) -> None:
    workflow = pgqrs.workflow("order", pgqrs.app.tasks["enqueue.charge"].s())
    with psycopg.connect(database_dsn, row_factory=dict_row) as connection:
        run = workflow.enqueue_using(connection, 42, workflow_key="order-42")
        assert due(pgqrs) == []
        assert pgqrs.monitor.run(run.id) is None
    assert run.status == "QUEUED"
    assert queue_length(pgqrs) == 0
    assert due(pgqrs) == ["enqueue.charge"]


def test_a_key_that_was_enqueued_in_a_transaction_starts_nothing_twice(pgqrs: Pgqrs, database_dsn: str) -> None:
    workflow = pgqrs.workflow("order", pgqrs.app.tasks["enqueue.charge"].s())
    with psycopg.connect(database_dsn) as connection:
        first = workflow.enqueue_using(connection, 42, workflow_key="order-42")
        assert workflow.enqueue_using(connection, 42, workflow_key="order-42") == first
    assert workflow.apply_async((42,), workflow_key="order-42") == first
    assert len(first.steps()) == 1


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_sqlalchemy_connections_and_sessions_take_part(pgqrs: Pgqrs, database_dsn: str, kind: str) -> None:
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database_dsn))
    charge = pgqrs.app.tasks["enqueue.charge"]
    if kind == "connection":
        with engine.begin() as connection:
            result = charge.enqueue_using(connection, 1, amount=2)
    else:
        with sa.orm.Session(engine) as session, session.begin():
            result = charge.enqueue_using(session, 1, amount=2)
    engine.dispose()
    run = pgqrs.run_of(result)
    assert run is not None
    assert due(pgqrs) == ["enqueue.charge"]


def test_a_connection_without_a_transaction_is_refused(pgqrs: Pgqrs, database_dsn: str) -> None:
    charge = pgqrs.app.tasks["enqueue.charge"]
    workflow = pgqrs.workflow("order", chain(charge.s(), charge.s()))
    with psycopg.connect(database_dsn, autocommit=True) as connection:
        with pytest.raises(ConfigurationError, match="autocommit"):
            workflow.enqueue_using(connection, 1)
        with connection.transaction():
            run = workflow.enqueue_using(connection, 1)
    assert run.status == "QUEUED"
    with pytest.raises(ConfigurationError, match="psycopg"):
        workflow.enqueue_using(object(), 1)
