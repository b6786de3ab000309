"""A session: a connection in use, with the named statements of one schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg.pq.abc import PGresult
from psycopg.rows import class_row

from pgqrs_celery.prepared import IDLE, Prepared, possible

__all__ = ["TRUE", "Connection", "Params", "Session", "silenced"]

Row = TypeVar("Row")
Params = Mapping[str, Any]
Connection = psycopg.Connection[Any]

#: How the server writes a boolean.
TRUE: Final = b"t"


class Session:
    """A connection in use, with the named statements of one schema.

    Outside ``Database.transaction()`` each statement is a transaction of its own.
    """

    __slots__ = ("_prepared", "_texts", "connection", "durable", "silence")

    def __init__(
        self, connection: Connection, texts: Mapping[str, str], durable: str = "on", silence: float = 0.0
    ) -> None:
        self.connection = connection
        self._texts = texts
        self._prepared: Prepared | None = None
        #: The value of ``synchronous_commit`` for what must be on disk before anybody acts on it.
        self.durable = durable
        #: For how long a transaction may be left alone by its client (seconds); 0 for ever.
        self.silence = silence

    @property
    def is_idle(self) -> bool:
        """Whether the connection is open, and in no transaction."""
        return self.connection.pgconn.transaction_status == IDLE

    def text(self, name: str) -> str:
        """Return the SQL of the named statement."""
        return self._texts[name]

    def run(self, name: str, params: Params | None = None) -> int:
        """Execute the named statement and return how many rows it touched."""
        return self.connection.execute(cast("Any", self._texts[name]), params).rowcount

    def quickly(self, name: str, params: Mapping[str, Any]) -> int:
        """Execute a named statement of the hot path and return how many rows it has touched; see ``prepared``."""
        return self._quick(name, params).command_tuples or 0

    def quick_row(self, name: str, params: Mapping[str, Any]) -> tuple[bytes | None, ...] | None:
        """Execute a named statement of the hot path and return its first row, as the server wrote it."""
        result = self._quick(name, params)
        if result.ntuples == 0:
            return None
        return tuple(result.get_value(0, column) for column in range(result.nfields))

    def _quick(self, name: str, params: Mapping[str, Any]) -> PGresult:
        if self.is_idle and (self._prepared is not None or possible(self.connection)):
            if self._prepared is None:
                self._prepared = Prepared.of(self.connection)
            return self._prepared.execute(name, self._texts[name], params)
        result = self.connection.execute(cast("Any", self._texts[name]), params).pgresult
        assert result is not None
        return result

    def send(self, name: str, params: Params | None = None) -> psycopg.Cursor[Any]:
        """Execute the named statement and return its cursor; inside a ``flush`` it has no answer until the end."""
        return self.connection.execute(cast("Any", self._texts[name]), params)

    @contextmanager
    def flush(self) -> Iterator[psycopg.Pipeline]:
        """Send what the block sends in one network flush, without waiting for answers in between."""
        with self.connection.pipeline() as pipeline:
            yield pipeline

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Make the statements of the block one transaction inside a ``flush``, committed before what follows."""
        self.connection.execute("BEGIN")
        yield
        self.connection.execute("COMMIT")

    def limit_silence(self) -> None:
        """Let the transaction that is open be rolled back when its client is not heard of for ``silence`` seconds.

        A process that is frozen, or whose host is lost, in the middle of a transaction would keep its locks, and with
        them the steps it has, from those that take them over.
        """
        self.connection.execute(silenced(self.silence))

    def row(self, name: str, params: Params | None = None) -> tuple[Any, ...] | None:
        """Execute the named statement and return its first row as a tuple."""
        return cast(
            "tuple[Any, ...] | None", self.connection.execute(cast("Any", self._texts[name]), params).fetchone()
        )

    def rows(self, name: str, params: Params | None = None) -> list[tuple[Any, ...]]:
        """Execute the named statement and return all its rows as tuples."""
        return self.connection.execute(cast("Any", self._texts[name]), params).fetchall()

    def one(self, record: type[Row], name: str, params: Params | None = None) -> Row | None:
        """Execute the named statement and return its first row as a record (column names are field names)."""
        with self.connection.cursor(row_factory=class_row(record)) as cursor:
            return cursor.execute(cast("Any", self._texts[name]), params).fetchone()

    def many(self, record: type[Row], name: str, params: Params | None = None) -> list[Row]:
        """Execute the named statement and return all its rows as records."""
        with self.connection.cursor(row_factory=class_row(record)) as cursor:
            return cursor.execute(cast("Any", self._texts[name]), params).fetchall()


def silenced(seconds: float) -> bytes:
    """Return the setting that ends a transaction whose client is not heard of for so many seconds."""
    # Local: behind a transaction pooler the session is others', too.
    return b"SET LOCAL idle_in_transaction_session_timeout = %d" % round(seconds * 1000)
