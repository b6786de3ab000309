"""Prepared statements with as little as possible between the caller and libpq.

psycopg's ``execute`` adapts parameters, parses the query and builds a cursor each time: about half of what a short
statement costs a client. For the few statements that are executed at every step, parameters are passed as text (bytes
as they are), the server knows their types, and the answer is left as it came. Signals, time limits and cooperative
threads are served while it is waited for.
"""

from __future__ import annotations

import re
import select
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

__all__ = ["applies", "array", "bytea", "execute"]

PARAMETER: Final = re.compile(r"%\((\w+)\)[sb]")


class Prepared:
    """What a connection has prepared, and what waits for its answers."""

    __slots__ = ("names", "poller")

    def __init__(self, socket: int) -> None:
        self.names: set[bytes] = set()
        self.poller = select.poll()
        self.poller.register(socket, select.POLLIN)


_prepared: weakref.WeakKeyDictionary[psycopg.Connection[Any], Prepared] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as the server takes it: numbered parameters, in the order of ``names``."""

    name: bytes
    text: bytes
    names: tuple[str, ...]


@lru_cache(maxsize=64)
def compiled(name: str, text: str) -> Statement:
    """Return a named statement with its parameters numbered."""
    names = list(dict.fromkeys(PARAMETER.findall(text)))
    numbered = PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", text).replace("%%", "%")
    return Statement(f"pgqrs_{name}".encode(), numbered.encode(), tuple(names))


def applies(connection: psycopg.Connection[Any]) -> bool:
    """Return whether a statement can be executed here on this connection; eventlet takes ``poll`` away."""
    idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
    return idle and connection.prepare_threshold is not None and hasattr(select, "poll")


def execute(connection: psycopg.Connection[Any], name: str, text: str, params: Mapping[str, Any]) -> PGresult:
    """Execute a statement and return its result, values as the server wrote them.

    For an idle autocommit connection that nobody else uses. Raises psycopg's errors.
    """
    pgconn = connection.pgconn
    statement = compiled(name, text)
    if pgconn.transaction_status != TransactionStatus.IDLE:
        raise psycopg.OperationalError("the connection is closed, or in the middle of something")
    prepared = _prepared.get(connection)
    if prepared is None:
        prepared = _prepared[connection] = Prepared(pgconn.socket)
    values: list[bytes | None] = []
    formats: list[int] | None = None
    for key in statement.names:
        value = params[key]
        if value is None:
            values.append(None)
        elif isinstance(value, bytes):
            formats = formats or [Format.TEXT] * len(statement.names)
            formats[len(values)] = Format.BINARY
            values.append(value)
        else:
            values.append(as_text(value))
    try:
        return _executed(pgconn, prepared, statement, values, formats)
    except psycopg.errors.InvalidSqlStatementName:
        # The driver deallocates all statements of a connection, not only its own, after a ROLLBACK or a DROP. The
        # others are noticed each in its turn: some may have been prepared since.
        prepared.names.discard(statement.name)
        return _executed(pgconn, prepared, statement, values, formats)


def as_text(value: Any) -> bytes:
    """Return a parameter's text; raises ``DataError`` for a NUL, where libpq would end it."""
    text = str(value).encode()
    if b"\0" in text:
        raise psycopg.DataError("text for Postgres cannot contain NUL (0x00) characters")
    return text


def array(items: Iterable[Any]) -> str:
    """Return an array's text; a third of what the driver's list adaptation costs, on the path of every message."""
    quoted = (str(item).replace("\\", r"\\").replace('"', r"\"") for item in items)
    return "{" + ",".join(f'"{item}"' for item in quoted) + "}"


def bytea(text: bytes) -> bytes:
    """Return the bytes that the server wrote as this text."""
    return psycopg.pq.Escaping().unescape_bytea(text)


def _executed(
    pgconn: PGconn,
    prepared: Prepared,
    statement: Statement,
    values: Sequence[bytes | None],
    formats: Sequence[int] | None,
) -> PGresult:
    if statement.name not in prepared.names:
        _prepare(pgconn, statement)
        prepared.names.add(statement.name)
    pgconn.send_query_prepared(statement.name, values, formats)
    return _checked(pgconn, _answer(pgconn, prepared.poller))


def _prepare(pgconn: PGconn, statement: Statement) -> None:
    try:
        _checked(pgconn, pgconn.prepare(statement.name, statement.text, None))
    except psycopg.errors.DuplicatePreparedStatement:
        # A time limit or a signal came between the server's answer and our taking note of it.
        _checked(pgconn, pgconn.exec_(b'DEALLOCATE "%s"' % statement.name))
        _checked(pgconn, pgconn.prepare(statement.name, statement.text, None))


def _answer(pgconn: PGconn, poller: select.poll) -> PGresult | None:
    """Wait for the answer of the statement that has been sent, and return its last result."""
    if pgconn.flush():
        poller.modify(pgconn.socket, select.POLLIN | select.POLLOUT)
        while pgconn.flush():
            poller.poll()
            pgconn.consume_input()
        poller.modify(pgconn.socket, select.POLLIN)
    last = None
    while True:
        while pgconn.is_busy():
            poller.poll()
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return last
        last = result


def _checked(pgconn: PGconn, result: PGresult | None) -> PGresult:
    if result is not None and result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        return result
    # A result of libpq's own making has no SQLSTATE: the server's farewell was not read before we wrote.
    if result is None or pgconn.status == ConnStatus.BAD or not result.error_field(DiagnosticField.SQLSTATE):
        raise psycopg.OperationalError(f"lost the connection: {pgconn.error_message.decode(errors='replace').strip()}")
    raise error_from_result(result)
