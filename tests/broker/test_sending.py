"""Sending: in the user's own transaction, in batches, again after a lost answer, with odd names and bodies."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import kombu
import psycopg
import pytest
import sqlalchemy
from celery import Celery
from kombu.exceptions import ChannelError
from sqlalchemy.orm import Session as OrmSession

from pgqrs_celery import outbox
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.transactions import in_transaction
from pgqrs_celery.transport import keeper
from tests.broker.test_prefetch import asleep
from tests.broker.workers import application
from tests.support.proxy import Proxy
from tests.support.waiting import wait_for

Rows = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def rows(database: Database) -> Rows:
    """Read the messages."""

    def rows(columns: str = "message_id", where: str = "true") -> list[tuple[Any, ...]]:
        with database.session() as session:
            text = f'SELECT {columns} FROM "{database.schema}".pgqrs_messages WHERE {where} ORDER BY position'
            return session.connection.execute(text).fetchall()

    return rows


@contextmanager
def with_psycopg(dsn: str) -> Iterator[tuple[Any, Callable[[], None], Callable[[], None]]]:
    with psycopg.connect(dsn) as connection:
        yield connection, connection.commit, connection.rollback


@contextmanager
def with_psycopg_dicts(dsn: str) -> Iterator[tuple[Any, Callable[[], None], Callable[[], None]]]:
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row) as connection:
        yield connection, connection.commit, connection.rollback


@contextmanager
def with_psycopg_transaction(dsn: str) -> Iterator[tuple[Any, Callable[[], None], Callable[[], None]]]:
    with psycopg.connect(dsn, autocommit=True) as connection:

        def roll_back() -> None:
            connection.execute("ROLLBACK")
            connection.execute("BEGIN")

        connection.execute("BEGIN")
        yield connection, lambda: connection.execute("COMMIT"), roll_back


@contextmanager
def with_sqlalchemy(dsn: str) -> Iterator[tuple[Any, Callable[[], None], Callable[[], None]]]:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with engine.connect() as connection:
        yield connection, connection.commit, connection.rollback
    engine.dispose()


@contextmanager
def with_orm(dsn: str) -> Iterator[tuple[Any, Callable[[], None], Callable[[], None]]]:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with OrmSession(engine) as session:
        yield session, session.commit, session.rollback
    engine.dispose()


WAYS = [with_psycopg, with_psycopg_dicts, with_psycopg_transaction, with_sqlalchemy, with_orm]


@pytest.mark.parametrize("way", WAYS)
def test_a_task_exists_if_and_only_if_the_transaction_commits(
    way: Any, database_dsn: str, client: Celery, rows: Rows
) -> None:
    with way(database_dsn) as (connection, commit, rollback):
        with in_transaction(connection):
            client.send_task("t", ("lost",))
            rollback()
        with in_transaction(connection):
            client.send_task("t", ("kept",))
            assert rows() == []
            commit()
    ((body,),) = rows("body")
    assert b"kept" in body


def test_a_commit_tells_consumers(
    database_dsn: str,
    database: Database,
    client: Celery,
    connect: Callable[..., kombu.Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "LOOK_INTERVAL", 3600.0)  # a look finds whatever nobody was told of
    connection = connect(lease=3 * 3600.0)
    got: list[Any] = []
    queue = kombu.Queue("celery")
    with connection.Consumer([queue], on_message=got.append, accept=["json"]), psycopg.connect(database_dsn) as user:
        wait_for(lambda: asleep(database, connection), what="the consumer to sleep")
        with in_transaction(user):
            client.send_task("t", (1,))
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.3)
        user.commit()
        connection.drain_events(timeout=20)
    assert len(got) == 1


def test_a_connection_without_a_transaction_is_refused(database_dsn: str, client: Celery) -> None:
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(database_dsn), isolation_level="AUTOCOMMIT"
    )
    with (
        psycopg.connect(database_dsn, autocommit=True) as plain,
        engine.connect() as core,
    ):
        for connection in (plain, core):
            with pytest.raises(ConfigurationError, match="autocommit"), in_transaction(connection):
                pass
    engine.dispose()
    with pytest.raises(ConfigurationError, match="object"), in_transaction(object()):
        pass


def test_errors_of_the_user_s_transaction_are_the_driver_s(database_dsn: str, client: Celery, rows: Rows) -> None:
    with psycopg.connect(database_dsn) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        with in_transaction(connection), pytest.raises(psycopg.errors.InFailedSqlTransaction):
            client.send_task("t", (1,))
        connection.rollback()
    assert rows() == []


def test_a_batch_is_one_statement(client: Celery, rows: Rows) -> None:
    with outbox.batch():
        for n in range(999):
            client.send_task("t", (n,))
        assert rows() == []
        client.send_task("t", (999,))
    found = rows("xmin::text, body")
    assert len(found) == 1000
    assert len({row[0] for row in found}) == 1
    assert [row[1].split(b",")[0] for row in found[:3]] == [b"[[0]", b"[[1]", b"[[2]"]


def test_an_exception_discards_the_batch(client: Celery, rows: Rows) -> None:
    def fail() -> None:
        with outbox.batch():
            client.send_task("t", (1,))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert rows() == []


def test_kombu_s_own_batch_is_one_statement(connection: kombu.Connection, rows: Rows) -> None:
    producer = connection.Producer()
    with producer.batch():
        for n in range(10):
            producer.publish({"n": n}, routing_key="q")
        assert rows() == []
    assert len({row[0] for row in rows("xmin::text")}) == 1
    assert len(rows()) == 10


def test_a_publish_retried_after_a_lost_answer_is_no_duplicate(
    proxy: Proxy, database: Database, client: Celery, rows: Rows
) -> None:
    url = f"pgqrs+postgresql://postgres@/postgres?host={proxy.directory}&pgqrs_schema={database.schema}"
    app = application(url)
    app.send_task("t", ("first",))
    for _ in range(5):
        proxy.lose_answer_to(b"marked")
        app.send_task("t", ("marked",), argsrepr="-")
    assert proxy.lost == 5
    assert len(rows(where="body LIKE '%marked%'")) == 5
    app.close()


def test_a_publish_that_failed_for_good_can_be_repeated_by_the_caller(
    proxy: Proxy, database: Database, rows: Rows
) -> None:
    url = f"pgqrs+postgresql://postgres@/postgres?host={proxy.directory}&pgqrs_schema={database.schema}"
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.queue_declare("q", durable=True)
        message = channel.prepare_message("marked twice", headers={}, properties={})
        proxy.lose_answer_to(b"marked twice")
        proxy.refuse(after=1)
        with pytest.raises(connection.connection_errors):
            channel.basic_publish(message, routing_key="q")
        proxy.refuse(after=None)
        channel.basic_publish(message, routing_key="q")
        channel.basic_publish(message, routing_key="q")
    # The second call completed the first; the third is another message.
    assert len(rows()) == 2


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_body_arrives_as_it_was_sent(serializer: str, compression: str | None, connection: kombu.Connection) -> None:
    body = {"nul": "a\x00b", "text": "ä\u2028", "n": 2**70, "none": None}
    headers = {"when": datetime(2026, 1, 2, tzinfo=UTC), "id": uuid.uuid4(), "nul": "\x00", "nan": float("inf")}
    got: list[tuple[Any, Any]] = []
    queue = kombu.Queue("q")
    connection.Producer().publish(
        body, routing_key="q", declare=[queue], serializer=serializer, compression=compression, headers=dict(headers)
    )
    accept = ["json", "pickle", "yaml"]
    with connection.Consumer([queue], callbacks=[lambda b, m: got.append((b, m))], accept=accept):
        connection.drain_events(timeout=5)
    assert got[0][0] == body
    assert {key: got[0][1].headers[key] for key in headers} == headers


@pytest.mark.parametrize("body", [b"\x00\xff\xfe", b"", "with\x00nul"])
def test_raw_bodies_need_no_encoding(body: Any, connection: kombu.Connection) -> None:
    got: list[Any] = []
    queue = kombu.Queue("q")
    encoding = "utf-8" if isinstance(body, str) else "binary"
    connection.Producer().publish(
        body, routing_key="q", declare=[queue], content_type="application/data", content_encoding=encoding
    )
    with connection.Consumer([queue], on_message=lambda m: got.append(m.body), accept=["application/data"]):
        connection.drain_events(timeout=5)
    assert got == [body.encode() if isinstance(body, str) else body]


def test_a_large_message_passes(connection: kombu.Connection) -> None:
    got: list[Any] = []
    queue = kombu.Queue("q")
    body = os.urandom(20_000_000)
    connection.Producer().publish(
        body, routing_key="q", declare=[queue], content_type="application/data", content_encoding="binary"
    )
    with connection.Consumer([queue], on_message=lambda m: got.append(m.body == body), accept=["application/data"]):
        connection.drain_events(timeout=10)
    assert got == [True]


def test_names_of_any_length_celery_produces_work(connection: kombu.Connection) -> None:
    name = f"{'h' * 255}@{'n' * 255}.celery.pidbox"
    with connection.SimpleQueue(name) as queue:
        queue.put("x")
        assert queue.get(timeout=5).payload == "x"


@pytest.mark.parametrize("name", ["q" * 1001, "ä" * 501, "a\x00b"])
def test_a_name_that_cannot_be_stored_is_refused_by_name(name: str, connection: kombu.Connection) -> None:
    with pytest.raises(ChannelError, match="queue"):
        connection.channel().queue_declare(name)
    with pytest.raises(ChannelError, match="queue"):
        connection.Producer().publish("x", routing_key=name)


def test_an_eta_without_a_zone_is_left_to_the_worker(client: Celery, rows: Rows) -> None:
    client.send_task("t", eta=datetime.now() + timedelta(hours=1))
    client.send_task("t", eta=datetime.now(UTC) + timedelta(hours=1))
    assert rows("visible_at IS NULL") == [(True,), (False,)]


def test_what_has_no_place_in_a_message_is_left_out(connection: kombu.Connection, rows: Rows) -> None:
    connection.Producer().publish("x", routing_key="q", signal=object(), correlation_id="c")
    ((properties,),) = rows("properties")
    assert '"correlation_id":"c"' in properties
