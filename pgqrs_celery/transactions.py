"""Sending ordinary tasks inside a transaction of the user's own.

::

    with engine.begin() as connection, in_transaction(connection):
        connection.execute(insert_order)
        send_receipt.delay(order_id)        # exists if and only if the order does

The messages are rows of that transaction: rolled back with it, delivered after its commit. This needs the Postgres
broker, in the same database. Durable tasks and workflows, on any broker, are recorded in the transaction if it is one
of the ledger's database, as with ``enqueue_using``; else they are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.outbox import Publisher, collecting
from pgqrs_celery.store import statements
from pgqrs_celery.store.messages import NewMessage, publication

__all__ = ["asynchronous", "current", "django_connection", "in_transaction", "is_asynchronous"]

#: Executes a statement on the user's connection and returns its rows.
Execute = Callable[[str, Mapping[str, Any]], list[Any]]

#: The user's connection of the innermost ``in_transaction``.
_connection: Final[ContextVar[Any]] = ContextVar("pgqrs_user_connection", default=None)


def current() -> Any:
    """Return the connection whose transaction everything sent is to be a part of, or None."""
    return _connection.get()


@contextmanager
def in_transaction(connection: Any) -> Iterator[None]:
    """Make every task sent inside a part of the connection's current transaction.

    ``connection`` is a psycopg (or psycopg2) connection, a SQLAlchemy ``Connection`` or ``Session``, a Django
    connection, or the alias of one. It is never committed here. Raises
    ``ConfigurationError`` where the connection is in autocommit mode, so that there is no transaction to be part of.
    Errors of the database are the driver's own: they are the transaction's.
    """
    if isinstance(connection, str):
        connection = django_connection(connection)
    if is_asynchronous(connection):
        raise ConfigurationError(asynchronous(connection))
    writer = _Writer(_execute_on(connection))
    token = _connection.set(connection)
    try:
        with collecting(writer):
            yield
    finally:
        _connection.reset(token)


def is_asynchronous(connection: Any) -> bool:
    """Return whether a connection or session must be awaited: psycopg's, SQLAlchemy's, asyncpg's."""
    return any(
        inspect.iscoroutinefunction(getattr(type(connection), name, None)) for name in ("commit", "execute", "connect")
    )


def asynchronous(connection: Any) -> str:
    """Return why an asynchronous connection is refused, and what to do instead."""
    kind = type(connection)
    return (
        f"{kind.__module__}.{kind.__qualname__} is asynchronous, and tasks are sent by synchronous code: open a "
        "synchronous connection (in a thread: asyncio.to_thread), or, with SQLAlchemy, send inside of "
        "`await connection.run_sync(function)`, whose argument is synchronous"
    )


class _Writer:
    """Writes messages through somebody else's connection."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._told: set[str] = set()

    def add_message(self, message: NewMessage, publisher: Publisher) -> None:
        """Insert the message, and have its consumers notified by the commit."""
        texts = statements.render(publisher.schema)
        params = {**publication([message]), "message_id": [str(message.message_id)]}
        # Binary parameters are psycopg 3's own.
        text = texts["messages.publish"].replace(")b::", ")s::")
        queues = {row[0] for row in self._execute(text, params)} - self._told
        if queues:
            self._execute(texts["consumers.tell"], {"queues": sorted(queues)})
            self._told |= queues


def _execute_on(connection: Any) -> Execute:
    if hasattr(connection, "exec_driver_sql"):
        return _sqlalchemy(connection)
    if hasattr(connection, "get_bind") and hasattr(connection, "connection"):
        return _sqlalchemy(connection.connection())
    if hasattr(connection, "in_atomic_block"):
        if not connection.in_atomic_block and connection.get_autocommit():
            raise _no_transaction(connection)
        return _dbapi(connection)
    if hasattr(connection, "cursor") and hasattr(connection, "commit"):
        if getattr(connection, "autocommit", False) and _is_idle(connection):
            raise _no_transaction(connection)
        return _dbapi(connection)
    raise ConfigurationError(
        f"in_transaction() takes a psycopg, SQLAlchemy or Django connection or a SQLAlchemy session, "
        f"not {type(connection).__qualname__}"
    )


def django_connection(alias: str) -> Any:
    """Return Django's connection of that name."""
    try:
        from django.db import connections
    except ImportError as error:
        raise ConfigurationError(f"{alias!r} looks like a Django alias, but Django is not installed") from error
    return connections[alias]


def _sqlalchemy(connection: Any) -> Execute:
    if connection.dialect.name != "postgresql" or connection.dialect.paramstyle != "pyformat":
        raise ConfigurationError(
            f"in_transaction() needs SQLAlchemy's psycopg or psycopg2 dialect, not {connection.dialect.driver}"
        )
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise _no_transaction(connection)

    def execute(text: str, params: Mapping[str, Any]) -> list[Any]:
        return list(connection.exec_driver_sql(text, dict(params)).fetchall())

    return execute


def _dbapi(connection: Any) -> Execute:
    def execute(text: str, params: Mapping[str, Any]) -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute(text, dict(params))
            rows = cursor.fetchall()
        return [tuple(row.values()) if isinstance(row, Mapping) else row for row in rows]

    return execute


def _is_idle(connection: Any) -> bool:
    info = connection.info
    status = info.transaction_status if hasattr(info, "transaction_status") else 0
    return int(status) == 0


def _no_transaction(connection: Any) -> ConfigurationError:
    return ConfigurationError(
        f"in_transaction() was given a connection in autocommit mode ({type(connection).__qualname__}): there is no "
        "transaction that the messages could be part of; begin one first"
    )
