"""A schema with the broker's tables, connections to it, and ways to look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery

from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from tests.broker.workers import Bench, application


@pytest.fixture
def database(database_dsn: str, installed_schema: str) -> Iterator[Database]:
    """The test's schema, installed."""
    database = Database(database_dsn, schema=installed_schema, pool_size=24)
    yield database
    database.close()


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """A connection on which every statement commits by itself."""
    with database.session() as session:
        yield session


@pytest.fixture
def broker_url(database_dsn: str, database: Database) -> str:
    """The broker's URL."""
    mark = "&" if "?" in database_dsn else "?"
    return f"pgqrs+{database_dsn}{mark}pgqrs_schema={database.schema}"


@pytest.fixture
def connect(broker_url: str) -> Iterator[Callable[..., kombu.Connection]]:
    """Make kombu connections, closed after the test; transport options as keyword arguments."""
    made: list[kombu.Connection] = []

    def make(**options: Any) -> kombu.Connection:
        made.append(kombu.Connection(broker_url, transport_options=options))
        return made[-1]

    yield make
    for connection in made:
        broker = connection.transport.broker
        connection.release()
        broker.database.close()


@pytest.fixture
def connection(connect: Callable[..., kombu.Connection]) -> kombu.Connection:
    """A kombu connection to the test's broker."""
    return connect()


@pytest.fixture
def bench(tmp_path: Path, broker_url: str) -> Iterator[Bench]:
    """Workers, and the log of what their tasks did."""
    bench = Bench(tmp_path, broker_url)
    yield bench
    bench.stop()


@pytest.fixture
def client(broker_url: str) -> Iterator[Celery]:
    """A Celery app that sends to the test's broker."""
    app = application(broker_url)
    yield app
    app.close()
