"""Enqueueing in the user's own transaction: the run exists if and only if that transaction commits.

Only the ledger's rows are written on the user's connection. PostgreSQL delivers the NOTIFY that goes with them at its
commit, and the relay of a worker publishes what it finds due. Nothing here ever commits or rolls back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from pgqrs_celery.borrowing import BorrowedSession, driver_connection
from pgqrs_celery.circumstances import outer
from pgqrs_celery.exceptions import ConfigurationError

__all__ = ["enqueueing"]


@contextmanager
def enqueueing(connection: Any, texts: Any) -> Iterator[None]:
    """Record every durable message sent inside on the user's connection, in its present transaction.

    ``connection`` is a psycopg connection, a SQLAlchemy ``Connection`` or ``Session``, a Django connection, or the
    alias of one. Raises ``ConfigurationError`` where it is something else, or has no transaction to be part of.
    """
    driver = driver_connection(connection)
    if driver.autocommit and driver.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        raise ConfigurationError(
            "the connection is in autocommit mode and no transaction has begun: there is none that the run could be "
            "part of; begin one, or use apply_async()"
        )
    token = outer.set(BorrowedSession(driver, texts))
    try:
        yield
    finally:
        outer.reset(token)
