"""Prepared statements with as little as possible between the caller and libpq.

psycopg's ``execute`` adapts parameters, parses the query and builds a cursor each time: about half of what a short
statement costs a client. For the few statements that are executed at every step, parameters are passed as text (bytes,
marked ``%(name)b``, as they are), the server knows their types, and the answer is left as it came. Signals, time limits
and cooperative threads are served while it is waited for.
"""

from __future__ import annotations

import re
import select
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

__all__ = ["IDLE", "Prepared", "array", "bytea", "possible"]

#: The state of a connection that is open, and in no transaction; as a number, which is faster to look up and compare.
IDLE: Final = int(TransactionStatus.IDLE)
ANSWERED: Final = (int(ExecStatus.TUPLES_OK), int(ExecStatus.COMMAND_OK))

PARAMETER: Final = re.compile(r"%\((\w+)\)([sb])")


class Texts(dict[type, Callable[[Any], bytes | None]]):
    """How values of each type are sent as text."""

    def __missing__(self, kind: type) -> Callable[[Any], bytes | None]:
        self[kind] = found = str.encode if issubclass(kind, str) else _as_text
        return found


def _as_text(value: object) -> bytes:
    return str(value).encode()


def _as_it_is(value: bytes | None) -> bytes | None:
    return value


def _refused(value: bytes) -> bytes:
    raise TypeError(f"bytes are a parameter marked %(name)b, not %(name)s: {value[:40]!r}")


TEXTS: Final = Texts({type(None): _as_it_is, bytes: _refused})


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as the server takes it: numbered parameters, first those that are text, then those that are bytes."""

    name: bytes
    text: bytes
    texts: tuple[str, ...]
    bodies: tuple[str, ...]
    #: The format of each, unless all are text.
    formats: tuple[int, ...] | None


@lru_cache(maxsize=64)
def compiled(name: str, text: str) -> Statement:
    """Return a named statement with its parameters numbered."""
    marked = dict.fromkeys(PARAMETER.findall(text))
    texts = tuple(key for key, mark in marked if mark == "s")
    bodies = tuple(key for key, mark in marked if mark == "b")
    keys = (*texts, *bodies)
    assert len(keys) == len(set(keys)), f"{name}: a parameter is text, or it is bytes"
    numbered = PARAMETER.sub(lambda found: f"${keys.index(found[1]) + 1}", text).replace("%%", "%")
    given = (Format.TEXT,) * len(texts) + (Format.BINARY,) * len(bodies)
    return Statement(f"pgqrs_{name}".encode(), numbered.encode(), texts, bodies, given if bodies else None)


def possible(connection: psycopg.Connection[Any]) -> bool:
    """Return whether statements can be executed here on this connection; eventlet takes ``poll`` away."""
    return connection.prepare_threshold is not None and hasattr(select, "poll")


class Prepared:
    """The statements that are prepared on a connection; one per connection."""

    __slots__ = ("_names", "_pgconn", "_poller")

    def __init__(self, pgconn: PGconn) -> None:
        self._pgconn = pgconn
        self._names: set[bytes] = set()
        self._poller = select.poll()
        self._poller.register(pgconn.socket, select.POLLIN)

    @classmethod
    def of(cls, connection: psycopg.Connection[Any]) -> Prepared:
        """Return a connection's."""
        found = _prepared.get(connection)
        if found is None:
            found = _prepared[connection] = cls(connection.pgconn)
        return found

    def execute(self, name: str, text: str, params: Mapping[str, Any]) -> PGresult:
        """Execute a statement and return its result, values as the server wrote them.

        For an autocommit connection that is idle, and that nobody else uses. Raises psycopg's errors.
        """
        statement = compiled(name, text)
        values = [TEXTS[type(value := params[key])](value) for key in statement.texts]
        for text_value in values:
            if text_value is not None and b"\0" in text_value:  # where libpq would end it
                raise psycopg.DataError("text for Postgres cannot contain NUL (0x00) characters")
        values += [params[key] for key in statement.bodies]
        try:
            return self._executed(statement, values)
        except psycopg.errors.InvalidSqlStatementName:
            # The driver deallocates all statements of a connection, not only its own, after a ROLLBACK or a DROP. The
            # others are noticed each in its turn: some may have been prepared since.
            self._names.discard(statement.name)
            return self._executed(statement, values)

    def _executed(self, statement: Statement, values: Sequence[bytes | None]) -> PGresult:
        if statement.name not in self._names:
            self._prepare(statement)
            self._names.add(statement.name)
        self._pgconn.send_query_prepared(statement.name, values, statement.formats)
        result = self._answer()
        return result if result is not None and result.status in ANSWERED else self._checked(result)

    def _prepare(self, statement: Statement) -> None:
        pgconn = self._pgconn
        try:
            self._checked(pgconn.prepare(statement.name, statement.text, None))
        except psycopg.errors.DuplicatePreparedStatement:
            # A time limit or a signal came between the server's answer and our taking note of it.
            self._checked(pgconn.exec_(b'DEALLOCATE "%s"' % statement.name))
            self._checked(pgconn.prepare(statement.name, statement.text, None))

    def _answer(self) -> PGresult | None:
        """Wait for the answer of the statement that has been sent, and return its last result."""
        pgconn, poller = self._pgconn, self._poller
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

    def _checked(self, result: PGresult | None) -> PGresult:
        if result is not None and result.status in ANSWERED:
            return result
        pgconn = self._pgconn
        # A result of libpq's own making has no SQLSTATE: the server's farewell was not read before we wrote.
        if result is None or pgconn.status == ConnStatus.BAD or not result.error_field(DiagnosticField.SQLSTATE):
            said = pgconn.error_message.decode(errors="replace").strip()
            raise psycopg.OperationalError(f"lost the connection: {said}")
        raise error_from_result(result)


_prepared: weakref.WeakKeyDictionary[psycopg.Connection[Any], Prepared] = weakref.WeakKeyDictionary()


def array(items: Iterable[Any]) -> str:
    """Return an array's text; a third of what the driver's list adaptation costs, on the path of every message."""
    quoted = (str(item).replace("\\", r"\\").replace('"', r"\"") for item in items)
    return "{" + ",".join(f'"{item}"' for item in quoted) + "}"


def bytea(text: bytes) -> bytes:
    """Return the bytes that the server wrote as this text."""
    return psycopg.pq.Escaping().unescape_bytea(text)
