"""Other people's transactions: the ledger's statements on a connection of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import psycopg
from psycopg.rows import RowFactory, class_row, tuple_row

from pgqrs_celery import transactions
from pgqrs_celery.circumstances import outer
from pgqrs_celery.db import Verbatim
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.execution import Execution
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Params, Session
from pgqrs_celery.transactions import asynchronous, django_connection, is_asynchronous

__all__ = ["BorrowedSession", "callers_session", "driver_connection"]

Row = TypeVar("Row")


class BorrowedSession(Session):
    """A session on a connection of the user's, whatever row factory or JSON loader he has set on it."""

    __slots__ = ()

    def _execute(self, factory: RowFactory[Any], name: str, params: Params | None) -> psycopg.Cursor[Any]:
        cursor = self.connection.cursor(row_factory=factory)
        cursor.adapters.register_loader("json", Verbatim)
        cursor.adapters.register_loader("jsonb", Verbatim)
        return cursor.execute(cast("Any", self.text(name)), params)

    def run(self, name: str, params: Params | None = None) -> int:
        """Execute the named statement and return how many rows it touched."""
        return self._execute(tuple_row, name, params).rowcount

    def send(self, name: str, params: Params | None = None) -> psycopg.Cursor[Any]:
        """Execute the named statement and return its cursor."""
        return self._execute(tuple_row, name, params)

    def row(self, name: str, params: Params | None = None) -> tuple[Any, ...] | None:
        """Execute the named statement and return its first row as a tuple."""
        return self._execute(tuple_row, name, params).fetchone()

    def rows(self, name: str, params: Params | None = None) -> list[tuple[Any, ...]]:
        """Execute the named statement and return all its rows as tuples."""
        return self._execute(tuple_row, name, params).fetchall()

    def one(self, record: type[Row], name: str, params: Params | None = None) -> Row | None:
        """Execute the named statement and return its first row as a record."""
        return cast("Row | None", self._execute(class_row(record), name, params).fetchone())

    def many(self, record: type[Row], name: str, params: Params | None = None) -> list[Row]:
        """Execute the named statement and return all its rows as records."""
        return self._execute(class_row(record), name, params).fetchall()


def callers_session(ledger: Ledger, messages: Sequence[Outgoing], running: Execution | None) -> Session | None:
    """Return the caller's own transaction, which messages are to be recorded in; None where there is none.

    It is that of ``enqueue_using``, or of ``in_transaction`` around the call. Raises ``ConfigurationError`` where the
    latter's connection cannot take the ledger's rows.
    """
    found, connection = outer.get(), transactions.current()
    if found is not None or connection is None:
        return found
    if running is not None and any(message.task_id == running.guard.task_id for message in messages):
        return None  # a retry, or what replaces the running step: that is nothing of the user's
    session = BorrowedSession(driver_connection(connection), ledger.database.texts)
    if session.row("runs.whereabouts") != ledger.call(lambda ours: ours.row("runs.whereabouts")):
        raise ConfigurationError(
            f"in_transaction() was given a connection to another database than the ledger's: {messages[0].name!r} "
            "cannot be recorded in its transaction, and was not sent. Send durable tasks outside of the block, or in a "
            "transaction of the ledger's database"
        )
    return session


def driver_connection(connection: Any) -> psycopg.Connection[Any]:
    """Return the psycopg connection beneath what the user has; raises ``ConfigurationError`` where there is none."""
    found = django_connection(connection) if isinstance(connection, str) else connection
    if is_asynchronous(found):
        raise ConfigurationError(asynchronous(found))
    if hasattr(found, "get_bind") and hasattr(found, "connection"):  # a SQLAlchemy session
        found = found.connection()
    if hasattr(found, "exec_driver_sql"):  # a SQLAlchemy connection
        found = found.connection.driver_connection
    elif hasattr(found, "in_atomic_block"):  # a Django connection
        found.ensure_connection()
        found = found.connection
    if not isinstance(found, psycopg.Connection):
        raise ConfigurationError(
            "durable tasks and workflows can be sent in the transactions of psycopg 3 only: those of a psycopg "
            "connection, a SQLAlchemy connection or session with the postgresql+psycopg dialect, a Django connection "
            f"or alias; not of a {type(found).__module__}.{type(found).__qualname__}. Nothing was sent"
        )
    return found
