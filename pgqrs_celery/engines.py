"""SQLAlchemy engines, one per database and process, for the transactions that are lent to users' code.

Importing this takes nearly as long as the rest of the package together, so nothing imports it that need not.
"""

from __future__ import annotations

import os
import weakref

import sqlalchemy as sa
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.pool import QueuePool

from pgqrs_celery.db import Database

__all__ = ["engine_of", "joining_session"]

#: The engine of each database, in the process that made it: sockets do not survive a fork.
_engines: weakref.WeakKeyDictionary[Database, tuple[int, sa.Engine]] = weakref.WeakKeyDictionary()


def engine_of(database: Database) -> sa.Engine:
    """Return this process's engine for a database."""
    found = _engines.get(database)
    if found is not None and found[0] == os.getpid():
        return found[1]
    engine = sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: database.connect(autocommit=False, verbatim=False),
        poolclass=QueuePool,
        pool_size=2,
        max_overflow=-1,
        pool_pre_ping=True,
    )
    if found is not None:
        found[1].dispose(close=False)
    _engines[database] = (os.getpid(), engine)
    return engine


def joining_session(connection: sa.Connection) -> OrmSession:
    """Return a session in a connection's transaction; its ``commit()`` flushes and goes on."""
    return OrmSession(bind=connection, join_transaction_mode="create_savepoint")
