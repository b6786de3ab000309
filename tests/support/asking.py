"""A statement to a server past the package, over one connection per server and process: tests ask a hundred times."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from pgqrs_celery.db import readable

__all__ = ["ask"]

_connections: dict[str, psycopg.Connection[Any]] = {}
_lock = threading.Lock()


def ask(
    dsn: str, statement: sql.SQL | sql.Composed, parameters: Sequence[Any] | Mapping[str, Any] = ()
) -> list[tuple[Any, ...]]:
    """Execute a statement in a transaction of its own; returns its rows, or an empty one for each that it changed."""
    with _lock:
        cursor = _connection(dsn).execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else [()] * cursor.rowcount


def _connection(dsn: str) -> psycopg.Connection[Any]:
    found = _connections.get(dsn)
    if found is None or found.closed or readable(found.fileno(), 0):  # what a server says unasked is that it ends
        if found is not None:
            found.close()
        found = _connections[dsn] = psycopg.connect(dsn, autocommit=True)
    return found
