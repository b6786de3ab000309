"""One LISTEN connection of a process: its channel, what arrived on it, and whether anything can arrive at all."""

from __future__ import annotations

import logging
import time
from typing import Any, Final
from uuid import uuid4

import psycopg
from psycopg import sql

from pgqrs_celery.db import Database, readable, redact
from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.store import waiters

__all__ = ["Listener"]

logger = logging.getLogger(__name__)

#: How long the notification that a listener sends to itself may take before it is given up, in seconds.
PROOF: Final = 5.0

#: So that a server that vanished without a word is noticed within half a minute.
KEEPALIVE: Final[dict[str, Any]] = {
    "keepalives": 1,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}

DEAF: Final = (
    "notifications do not arrive through %s; is there a transaction pooler such as pgbouncer in between? Set "
    "pgqrs_direct_dsn to a DSN that reaches Postgres itself. Until then results are looked up twice a second."
)


class Listener:
    """Listens on a channel of its own; one thread at a time may ``wait``, others may go on using the database.

    The connection is outside the pool, and waiting is a plain ``select`` on its socket, so that gevent and eventlet,
    which replace ``select``, run other greenlets meanwhile.
    """

    def __init__(self, database: Database, direct_dsn: str | None = None) -> None:
        self._database = database
        self._dsn = direct_dsn
        self._connection: psycopg.Connection[Any] | None = None
        self._give_up_at = 0.0
        self.channel = f"pgqrs_{uuid4().hex}"
        #: Whether a notification has been seen to arrive; None while that is being tried.
        self.proven: bool | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    def connect(self) -> None:
        """Open the connection and listen; raises ``StoreUnavailable``."""
        connection = self._database.connect(self._dsn, **KEEPALIVE)
        try:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self.channel)))
        except psycopg.Error as error:
            connection.close()
            raise StoreUnavailable(f"cannot listen: {error}") from error
        self._connection = connection
        if not self.proven:
            self.proven = None
            self._give_up_at = time.monotonic() + PROOF
            self._database.call(lambda session: waiters.ping(session, self.channel))

    def wait(self, timeout: float) -> list[str]:
        """Return what was notified, as soon as there is something, or nothing after ``timeout`` seconds.

        Raises ``StoreUnavailable`` when the connection is lost; ``connect`` may then be called again.
        """
        connection = self._connection
        if connection is None:
            raise StoreUnavailable("not listening")
        try:
            heard = take(connection)
            if not heard and readable(connection.pgconn.socket, timeout):
                connection.pgconn.consume_input()
                heard = take(connection)
        except (psycopg.Error, OSError, ValueError) as error:
            self.close()
            raise StoreUnavailable(f"lost the connection that listens: {str(error).strip()}") from error
        if self.proven is None:
            self._judge(bool(heard))
        return [payload for payload in heard if payload]

    def _judge(self, heard: bool) -> None:
        if heard:
            self.proven = True
        elif time.monotonic() >= self._give_up_at:
            self.proven = False
            logger.warning(DEAF, redact(self._dsn or self._database.dsn))

    def close(self) -> None:
        """Stop listening."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abandon(self) -> None:
        """Forget a connection that belongs to the parent process, without touching it."""
        self._connection = None


def take(connection: psycopg.Connection[Any]) -> list[str]:
    """Return the payloads of the notifications that have been received."""
    payloads = []
    while (notification := connection.pgconn.notifies()) is not None:
        payloads.append(notification.extra.decode(connection.info.encoding))
    return payloads
