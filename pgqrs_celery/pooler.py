"""Finding out whether a connection reaches Postgres itself or a transaction pooler."""

from __future__ import annotations

import time
from typing import Final
from uuid import uuid4

import psycopg

from pgqrs_celery.db import Database, is_direct, notifications, translate
from pgqrs_celery.session import Connection

__all__ = ["is_own_session"]

#: Seconds a notification may take through a pooler that passes it on.
TIMEOUT: Final = 1.0


def is_own_session(database: Database, connection: Connection) -> bool:
    """Return whether the connection is a session of its own: it is notified, and keeps locks and settings.

    A pooler tells the client a process id of its own invention. One in session mode passes notifications on, one in
    transaction mode does not; a second connection tries. Raises ``StoreError``.
    """
    try:
        if is_direct(connection):
            return True
        channel = f"pgqrs_{uuid4().hex}"
        connection.execute(f'LISTEN "{channel}"')
        database.call(lambda session: session.connection.execute("SELECT pg_notify(%s, 'hello')", [channel]))
        deadline = time.monotonic() + TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            if "hello" in notifications(connection, left):
                return True
        return False
    except psycopg.Error as error:
        raise translate(error, database.schema) from error
