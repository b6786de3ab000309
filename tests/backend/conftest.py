"""A schema with the package's tables, a Celery app that stores its results there, and ways to look at the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from celery import Celery

from pgqrs_celery.backend import PostgresBackend
from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from tests.backend.application import make_app


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
def backend_url(database_dsn: str, database: Database) -> str:
    """The URL of the result backend."""
    return f"pgqrs+{database_dsn}&pgqrs_schema={database.schema}&application_name={database.schema}"


@pytest.fixture
def new_app(backend_url: str) -> Iterator[Callable[..., Celery]]:
    """Make apps that store their results in the test's schema; settings as keyword arguments."""
    made: list[Celery] = []

    def make(url: str = backend_url, **conf: Any) -> Celery:
        made.append(make_app("memory://", url, **conf))
        return made[-1]

    yield make
    for app in made:
        close(app)


def close(app: Celery) -> None:
    """End the connections of an app's backend, if it has come to that."""
    backend: PostgresBackend | None = app._backend
    if backend is None:
        return
    backend.result_consumer.stop()
    backend.database.close()


@pytest.fixture
def app(new_app: Callable[..., Celery]) -> Celery:
    """A Celery app that stores its results in the test's schema; it sends no tasks."""
    app = new_app()
    # Celery makes the backend at first use, and more than one if several threads come at the same moment.
    assert app.backend
    return app


@pytest.fixture
def backend(app: Celery) -> PostgresBackend:
    """The backend of ``app``."""
    return app.backend


class Spy:
    """Looks at one schema from outside of the code under test."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.schema = schema

    def rows(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query in which ``{}`` stands for the schema."""
        return self.connection.execute(query.replace("{}", f'"{self.schema}"').encode(), params).fetchall()

    def value(self, query: str, *params: Any) -> Any:
        """Return the first value of a query."""
        return self.rows(query, *params)[0][0]

    def connections(self) -> list[tuple[int, str]]:
        """Return pid and last statement of every connection the test's apps have."""
        return self.rows("SELECT pid, query FROM pg_stat_activity WHERE application_name = %s", self.schema)

    def listeners(self) -> list[int]:
        """Return the pids of the connections that listen."""
        return [pid for pid, query in self.connections() if query.startswith("LISTEN")]


@pytest.fixture
def spy(database: Database, database_dsn: str) -> Iterator[Spy]:
    """A connection of the test's own."""
    spy = Spy(database_dsn, database.schema)
    yield spy
    spy.connection.close()
