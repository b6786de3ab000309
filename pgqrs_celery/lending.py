"""Transactions lent to a step's body: what it writes on them is committed together with its checkpoint.

They have connections of their own, so that a body that calls other steps, or sends tasks, can never wait for the very
connection it holds. The psycopg connection and the SQLAlchemy session are two faces of one connection and one
transaction; neither can end it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import psycopg

from pgqrs_celery.db import Database, translate
from pgqrs_celery.exceptions import StepMisused
from pgqrs_celery.session import Session

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as OrmSession

__all__ = ["Work", "begin", "current", "in_transaction", "prepare"]

logger = logging.getLogger(__name__)

_current: ContextVar[Work | None] = ContextVar("pgqrs_transaction", default=None)


class Work:
    """One transaction, from ``begin`` to ``commit`` or ``roll_back``."""

    def __init__(self, database: Database) -> None:
        from pgqrs_celery import engines

        self._database = database
        self._stack = ExitStack()
        self._sa = self._stack.enter_context(engines.engine_of(database).connect())
        driver: Any = self._sa.connection.driver_connection
        self.connection: psycopg.Connection[Any] = driver
        self._sa.begin()  # sends nothing; sessions that join it keep to savepoints
        self._transaction = self._stack.enter_context(self.connection.transaction())
        self._session: OrmSession | None = None

    @property
    def session(self) -> OrmSession:
        """A SQLAlchemy session in this transaction; its ``commit()`` flushes and goes on."""
        if self._session is None:
            from pgqrs_celery import engines

            self._session = engines.joining_session(self._sa)
        return self._session

    def commit(self, checkpoint: Callable[[Session], Any]) -> Any:
        """Write the checkpoint and commit; returns what the checkpoint does.

        Raises psycopg's errors where the body's own writes cannot be committed.
        """
        try:
            if self._session is not None:
                self._session.commit()
                self._session.close()
            answer = checkpoint(Session(self.connection, self._database.texts))
        except BaseException:
            self.roll_back()
            raise
        self._stack.close()
        return answer

    def roll_back(self) -> None:
        """Undo everything the body has written."""
        if self._session is not None:
            self._session.close()
        try:
            with self._stack:
                raise psycopg.Rollback(self._transaction)
        except psycopg.Error as error:
            logger.warning("a transaction is rolled back by the server: %s", translate(error, self._database.schema))

    def __enter__(self) -> Work:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def prepare() -> None:
    """Import SQLAlchemy, which only transactional steps need, where one is declared: before a worker forks."""
    importlib.import_module("pgqrs_celery.engines")


def begin(database: Database) -> Work:
    """Begin a transaction. Raises ``StepMisused`` inside another one, ``StoreUnavailable``."""
    if _current.get() is not None:
        raise StepMisused("a transactional step cannot call another one: the inner one's checkpoint could be undone")
    return Work(database)


def current() -> Work:
    """Return the transaction of the step that is being executed; raises ``StepMisused`` outside of one."""
    work = _current.get()
    if work is None:
        raise StepMisused("there is a connection only inside a step or task declared with transactional=True")
    return work


def in_transaction() -> bool:
    """Return whether a transactional step is being executed."""
    return _current.get() is not None
