"""Connections to Postgres: a small pool per process that survives forks, threads and restarts of the server.

``psycopg_pool`` is not used because a Celery worker forks after its main process has connected: here a child simply
starts with an empty pool, and no thread of the pool's own has to exist.

Every error of the driver leaves this module as one of ``exceptions.StoreError``'s kinds, once.
"""

from __future__ import annotations

import logging
import os
import random
import select
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

from pgqrs_celery.exceptions import ConfigurationError, NotInstalled, StoreError, StoreUnavailable
from pgqrs_celery.pool import Pool
from pgqrs_celery.session import Connection, Session, silenced
from pgqrs_celery.store import statements

__all__ = ["Database", "readable", "redact"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for which a transaction waits for its client, unless the ledger's lease is shorter.
SILENCE: Final = 30.0

MISSING: Final = (pg.UndefinedTable, pg.UndefinedFunction, pg.UndefinedColumn, pg.InvalidSchemaName)

#: Errors after which the same call may well succeed: the server went away, is starting, is full, or it had
#: to choose a victim.
PASSING: Final = (
    pg.OperationalError,
    pg.InterfaceError,
    pg.AdminShutdown,
    pg.CrashShutdown,
    pg.CannotConnectNow,
    pg.TooManyConnections,
    pg.SerializationFailure,
    pg.DeadlockDetected,
    pg.LockNotAvailable,
    pg.ReadOnlySqlTransaction,
    pg.IdleInTransactionSessionTimeout,
)


class Verbatim(Loader):
    """Loads ``json`` and ``jsonb`` as the text that was stored; ``codec`` decides what it means."""

    def load(self, data: Any) -> str:
        return bytes(data).decode("utf-8")


def redact(dsn: str) -> str:
    """Return the DSN without its password, fit for a log line."""
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return "<unreadable DSN>"
    return " ".join(f"{key}={value}" for key, value in parts.items() if key not in {"password", "sslpassword"})


def translate(error: psycopg.Error, schema: str) -> StoreError:
    """Return this package's error for one of the driver's."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, MISSING):
        return NotInstalled(
            f"the schema {schema!r} holds no (complete) pgqrs tables: {text.splitlines()[0]}. "
            "Run `celery -A your_app pgqrs install`, or Pgqrs(app).install()."
        )
    if isinstance(error, PASSING):
        return StoreUnavailable(f"the database does not answer: {text}")
    return StoreError(f"the database refused a statement: {text}")


class Database:
    """A bounded pool of autocommit connections to one database and schema.

    Threads may share it. After a fork the child owns an empty pool; the parent's sockets are closed in the child
    without a word to the server, so that the parent's sessions end when the parent does.
    """

    def __init__(
        self,
        dsn: str | Callable[[], str],
        *,
        schema: str = "public",
        pool_size: int = 8,
        connect_timeout: float = 5.0,
        prepared_statements: bool = True,
        synchronous_commit: bool = True,
        application_name: str = "pgqrs",
        auto_install: bool = False,
    ) -> None:
        self._dsn = dsn
        self._conninfo: str | None = None
        self.schema = schema
        #: Whether the schema is to be installed or upgraded at first use.
        self.auto_install = auto_install
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout
        self._prepare_threshold = 1 if prepared_statements else None
        self._synchronous_commit = synchronous_commit
        self._application_name = application_name
        #: How many seconds the server waits for a client in the middle of one of ``transaction()``'s.
        self.silence = SILENCE
        self._reset()
        _databases.add(self)

    def _reset(self) -> None:
        self.pool = Pool(self._pool_size)
        self._known: weakref.WeakSet[Connection] = weakref.WeakSet()

    def forget_inherited(self) -> None:
        """Start afresh in a forked child: close the parent's sockets, send nothing on them."""
        for connection in list(self._known):
            with suppress(psycopg.Error, OSError):
                os.close(connection.pgconn.socket)
            _inherited.append(connection)
        self._reset()

    @property
    def dsn(self) -> str:
        """The DSN as libpq takes it, resolved at first use."""
        if self._conninfo is None:
            self._conninfo = self._dsn() if callable(self._dsn) else self._dsn
        return self._conninfo

    @property
    def texts(self) -> Mapping[str, str]:
        """The named statements for this schema."""
        return statements.render(self.schema)

    def connect(
        self, dsn: str | None = None, *, autocommit: bool = True, verbatim: bool = True, **extra: Any
    ) -> Connection:
        """Return a new connection that is not part of the pool; the caller closes it.

        ``verbatim`` makes JSON columns come as the text that was stored; a user's own queries want values.
        Raises ``StoreUnavailable`` where nobody answers and ``ConfigurationError`` where the DSN cannot be read.
        """
        target = dsn or self.dsn
        try:
            arguments: dict[str, Any] = {
                "connect_timeout": round(self._connect_timeout) or 1,
                "application_name": self._application_name,
                **conninfo_to_dict(target),
                "client_encoding": "UTF8",
                **extra,
            }
        except psycopg.ProgrammingError as error:
            raise ConfigurationError(f"the DSN cannot be read: {error}") from None
        try:
            connection: Connection = psycopg.connect(
                make_conninfo("", **arguments),
                autocommit=autocommit,
                prepare_threshold=self._prepare_threshold,
                row_factory=tuple_row,
            )
            if autocommit and is_direct(connection):
                connection.execute(self._session_settings(), prepare=False)
        except psycopg.Error as error:
            raise StoreUnavailable(f"cannot connect to {redact(target)}: {str(error).strip()}") from error
        if verbatim:
            connection.adapters.register_loader("json", Verbatim)
            connection.adapters.register_loader("jsonb", Verbatim)
        self._known.add(connection)
        return connection

    def _session_settings(self) -> bytes:
        """What every session of ours is set to: its statements find their rows by key, whatever statistics say.

        Planning such a statement anew would cost more than executing it, and a plan made while a table was small
        (scan it all, hash it) must not outlive that. Not for a pooler's session, which is lent to others next.
        """
        settings = ["enable_seqscan = off", "enable_hashjoin = off", "enable_mergejoin = off", "jit = off"]
        if self._prepare_threshold is not None:
            settings.append("plan_cache_mode = force_generic_plan")
        if not self._synchronous_commit:
            settings.append("synchronous_commit = off")
        return "; ".join(f"SET {setting}" for setting in settings).encode()

    def session(self) -> AbstractContextManager[Session]:
        """Lend a session; every statement in it commits by itself."""
        return Loan(self)

    def new_session(self) -> Session:
        """Return a session on a new connection."""
        return Session(self.connect(), self.texts, "on" if self._synchronous_commit else "off")

    def discard(self, session: Session) -> None:
        """Close a session, if it is not one of the parent's; what the server has ended did not end alone."""
        connection = session.connection
        if connection not in self._known:
            return
        broken = connection.broken
        connection.close()
        if broken:
            self.close()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Lend a session inside one transaction: committed at the end, rolled back by any exception.

        Also rolled back, with ``StoreUnavailable``, when nothing is heard of this process for ``silence`` seconds.
        """
        with self.session() as session:
            connection = session.connection
            connection.execute(b"BEGIN; " + silenced(session.silence), prepare=False)
            try:
                yield session
            except BaseException:
                with suppress(psycopg.Error):
                    connection.rollback()
                raise
            connection.commit()

    def call(
        self,
        work: Callable[[Session], T],
        *,
        patience: float = 0.0,
        transaction: bool = False,
        stop: threading.Event | None = None,
    ) -> T:
        """Return ``work(session)``, calling it again while the database is away.

        The work must be idempotent: the answer of a COMMIT may have been lost. One more attempt is always made at
        once, because the pooled connection may only be left over from before a restart; after that, attempts go on
        with back-off for ``patience`` seconds, or until ``stop`` is set. Raises ``StoreUnavailable`` in the end.
        """
        deadline = time.monotonic() + patience
        attempt = 0
        while True:
            try:
                with self.transaction() if transaction else self.session() as session:
                    return work(session)
            except StoreUnavailable as error:
                attempt += 1
                if attempt == 1:
                    continue
                pause = min(2.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0)
                if time.monotonic() + pause > deadline:
                    raise
                if attempt == 2:
                    logger.warning("%s; trying again for %.0f s", error, patience)
                if (stop or threading.Event()).wait(pause):
                    raise

    def close(self) -> None:
        """Close the idle connections; the database can be used again afterwards."""
        for session in self.pool.drain():
            session.connection.close()


class Loan:
    """A session of the pool for the length of a ``with`` block; the driver's errors leave it as this package's.

    A class, where a generator would do: it is entered at every step of every function.
    """

    __slots__ = ("_database", "_placed", "_pool", "_session")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Session:
        database = self._database
        pool = self._pool = database.pool
        session, self._placed = pool.enter()
        if session is None:
            try:
                session = database.new_session()
            except BaseException:
                pool.leave(None, placed=self._placed)
                raise
        session.silence = database.silence
        self._session = session
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, database = self._session, self._database
        if self._pool is not database.pool:  # the process has forked since
            database.discard(session)
        elif self._placed and session.is_idle:
            self._pool.leave(session, placed=True)
        else:  # of no more use, or one too many
            database.discard(session)
            self._pool.leave(None, placed=self._placed)
        if isinstance(error, psycopg.Error):
            raise translate(error, database.schema) from error


def is_direct(connection: Connection) -> bool:
    """Return whether Postgres itself answers; a pooler tells its client a process id of its own invention."""
    row = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    return row is not None and row[0] == connection.info.backend_pid


#: Between the parts of a notification's text. JSON text cannot hold it.
SEPARATOR: Final = "\x1f"


def notifications(connection: Connection, timeout: float) -> Sequence[str]:
    """Return the payloads of the NOTIFYs that arrive within ``timeout`` seconds, at once after the first.

    The waiting is done here and not in the driver, which knows gevent but not eventlet, and would stop its whole
    process.
    """
    try:
        heard = [n.payload for n in connection.notifies(timeout=0)]
        if not heard and readable(connection.pgconn.socket, timeout):
            heard = [n.payload for n in connection.notifies(timeout=0)]
        return heard
    except (psycopg.Error, OSError, ValueError) as error:
        raise StoreUnavailable(f"lost the listening connection: {error}") from error


def readable(fd: int, timeout: float) -> bool:
    """Return whether something can be read from the socket within ``timeout`` seconds; other greenlets run on."""
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(timeout * 1000))
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(timeout))


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
#: Kept for ever, so that the driver never finishes a parent's connection from a child.
_inherited: list[Connection] = []


def _after_fork() -> None:
    for database in list(_databases):
        database.forget_inherited()


os.register_at_fork(after_in_child=_after_fork)
