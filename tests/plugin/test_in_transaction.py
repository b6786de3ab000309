"""Durable tasks and workflows sent inside of ``in_transaction``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import psycopg2
import pytest
import sqlalchemy as sa
from celery import Celery, chain, group
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session as OrmSession

from pgqrs_celery import ConfigurationError, Pgqrs
from pgqrs_celery.transactions import in_transaction


@pytest.fixture(params=["redis", "postgres"])
def pgqrs(request: pytest.FixtureRequest, database_dsn: str, installed_schema: str, redis_url: str) -> Iterator[Pgqrs]:
    """An app on either broker, with a durable task and a plain one."""
    ours = f"pgqrs+{database_dsn}{'&' if '?' in database_dsn else '?'}pgqrs_schema={installed_schema}"
    app = Celery("inside", broker=redis_url if request.param == "redis" else ours, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    pgqrs = Pgqrs(app)

    @pgqrs.task(name="inside.charge", shared=False)
    def charge(order: int) -> int:
        return order

    @app.task(name="inside.receipt", shared=False)
    def receipt(order: int) -> int:
        return order

    app.finalize()
    yield pgqrs
    pgqrs.ledger.database.close()
    app.close()


def recorded(pgqrs: Pgqrs) -> list[str]:
    """What the runs in the ledger are called."""
    return sorted(run.name for run in pgqrs.monitor.runs())


def waiting(pgqrs: Pgqrs) -> int:
    """How many messages are in the queue."""
    with pgqrs.app.connection_for_write() as connection:
        try:
            return int(connection.default_channel.queue_declare("celery", passive=True).message_count)
        except connection.channel_errors:  # Redis has no empty queues
            return 0


def test_durable_tasks_and_workflows_exist_if_and_only_if_the_transaction_commits(
    pgqrs: Pgqrs, database_dsn: str
) -> None:
    charge = pgqrs.app.tasks["inside.charge"]
    order = pgqrs.workflow("order", chain(charge.s(), charge.s()))
    with psycopg.connect(database_dsn) as connection, in_transaction(connection):
        charge.delay(1)
        lost = order.apply_async((1,), workflow_key="order-1")
        connection.rollback()
    assert (recorded(pgqrs), waiting(pgqrs)) == ([], 0)
    with psycopg.connect(database_dsn) as connection, in_transaction(connection):
        charge.delay(2)
        kept = order.apply_async((1,), workflow_key="order-1")
        group(charge.s(n) for n in range(3)).delay()
        assert (recorded(pgqrs), waiting(pgqrs)) == ([], 0)
    assert len(recorded(pgqrs)) == 3
    assert kept.status == "QUEUED"
    assert lost != kept
    assert waiting(pgqrs) == 0  # a worker's relay sends them
    charge.delay(3)
    assert waiting(pgqrs) == 1


def test_sqlalchemy_sessions_take_durable_tasks_along(pgqrs: Pgqrs, database_dsn: str) -> None:
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database_dsn))
    for commits in (False, True):
        with OrmSession(engine) as session, in_transaction(session):
            pgqrs.app.tasks["inside.charge"].delay(1)
            if commits:
                session.commit()
    engine.dispose()
    assert recorded(pgqrs) == ["charge"]


def test_a_connection_to_another_database_is_refused_and_nothing_is_sent(
    pgqrs: Pgqrs, database_dsn: str, own_database_dsn: str
) -> None:
    charge = pgqrs.app.tasks["inside.charge"]
    refused = pytest.raises(ConfigurationError, match=r"another database.*inside\.charge.*not sent")
    with psycopg.connect(own_database_dsn) as connection, in_transaction(connection), refused:
        charge.delay(1)
    assert (recorded(pgqrs), waiting(pgqrs)) == ([], 0)


def test_psycopg2_cannot_take_durable_tasks_and_says_so(pgqrs: Pgqrs, database_dsn: str) -> None:
    connection = psycopg2.connect(database_dsn)
    with in_transaction(connection), pytest.raises(ConfigurationError, match=r"psycopg 3.*psycopg2.*Nothing was sent"):
        pgqrs.app.tasks["inside.charge"].delay(1)
    connection.close()
    assert (recorded(pgqrs), waiting(pgqrs)) == ([], 0)


def test_a_plain_task_is_sent_in_the_transaction_or_not_at_all(pgqrs: Pgqrs, database_dsn: str) -> None:
    receipt = pgqrs.app.tasks["inside.receipt"]
    with psycopg.connect(database_dsn) as connection, in_transaction(connection):
        if pgqrs.broker is None:
            with pytest.raises(ConfigurationError, match=r"inside\.receipt.*not durable"):
                receipt.delay(1)
        else:
            receipt.delay(1)
            assert waiting(pgqrs) == 0
    assert waiting(pgqrs) == (0 if pgqrs.broker is None else 1)


def test_asynchronous_connections_are_refused(database_dsn: str) -> None:
    engine = create_async_engine("postgresql+psycopg://", async_creator=lambda: asynchronous())

    async def asynchronous() -> Any:
        return await psycopg.AsyncConnection.connect(database_dsn)

    def entered(connection: Any) -> None:
        with pytest.raises(ConfigurationError, match="asynchronous"), in_transaction(connection):
            pass

    async def main() -> None:
        async with await asynchronous() as connection:
            entered(connection)
        async with engine.connect() as connection:
            entered(connection)
        async with AsyncSession(engine) as session:
            entered(session)
        await engine.dispose()

    asyncio.run(main())


def test_a_synchronous_function_run_by_an_asynchronous_connection_sends_in_its_transaction(
    database_dsn: str, installed_schema: str
) -> None:
    broker = f"pgqrs+{database_dsn}{'&' if '?' in database_dsn else '?'}pgqrs_schema={installed_schema}"
    app = Celery("inside", broker=broker, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    Pgqrs(app)
    engine = create_async_engine(
        "postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(database_dsn)
    )

    def send(connection: Any) -> None:
        with in_transaction(connection):
            app.send_task("receipt", (1,))

    async def main() -> None:
        async with engine.connect() as connection:
            await connection.run_sync(send)
            await connection.rollback()
            await connection.run_sync(send)
            await connection.commit()
        await engine.dispose()

    asyncio.run(main())
    with psycopg.connect(database_dsn) as connection:
        query = sql.SQL("SELECT count(*) FROM {}.pgqrs_messages").format(sql.Identifier(installed_schema))
        assert connection.execute(query).fetchone() == (1,)
    app.pgqrs.ledger.database.close()  # type: ignore[attr-defined]
    app.close()
