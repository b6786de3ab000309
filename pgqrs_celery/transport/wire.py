"""A wire: one connection on which one statement at a time is under way, and nobody waits for it.

An event loop sends a statement and goes on; the answer arrives as the socket becomes readable. Notifications come on
the same socket, also together with an answer, and are kept until somebody asks.
"""

from __future__ import annotations

import re
import select
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer

from pgqrs_celery.db import translate
from pgqrs_celery.exceptions import StoreUnavailable

__all__ = ["Wire", "readable"]

PLACEHOLDER: Final = re.compile(r"%\((\w+)\)s")
#: Seconds a full socket buffer may stay full.
SEND_TIMEOUT: Final = 5.0

Connection = psycopg.Connection[Any]


class Wire:
    """Sends the named statements of one schema without waiting for their answers.

    ``StoreUnavailable`` from any method means that the connection is gone; other ``StoreError``s concern one statement.
    """

    def __init__(self, connection: Connection, texts: Mapping[str, str], schema: str, *, prepare: bool) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._texts = texts
        self._schema = schema
        self._prepare = prepare
        self._statements: dict[str, tuple[bytes, tuple[str, ...]]] = {}
        self._results: list[pq.abc.PGresult] = []
        # libpq closes the socket itself when the server hangs up, and then does not know its number any more.
        self._fd = connection.pgconn.socket
        #: The name of the statement under way.
        self.current: str | None = None

    def fileno(self) -> int:
        """Return the socket to wait for."""
        return self._fd

    def send(self, name: str, params: Mapping[str, Any]) -> None:
        """Send a statement; none may be under way."""
        assert self.current is None
        try:
            text, order = self._statement(name)
            transformer = Transformer(self._connection)
            values = transformer.dump_sequence([params[p] for p in order], [PyFormat.TEXT] * len(order))
            if self._prepare:
                self._pgconn.send_query_prepared(name.encode(), values, result_format=pq.Format.BINARY)
            else:
                self._pgconn.send_query_params(text, values, result_format=pq.Format.BINARY)
            self._flush()
        except psycopg.Error as error:
            raise StoreUnavailable(f"lost the broker connection: {error}") from error
        self.current = name

    def _statement(self, name: str) -> tuple[bytes, tuple[str, ...]]:
        known = self._statements.get(name)
        if known is None:
            order = tuple(dict.fromkeys(PLACEHOLDER.findall(self._texts[name])))
            text = PLACEHOLDER.sub(lambda m: f"${order.index(m[1]) + 1}", self._texts[name]).encode()
            if self._prepare:
                result = self._pgconn.prepare(name.encode(), text)
                if result.status != pq.ExecStatus.COMMAND_OK:
                    raise translate(psycopg.errors.error_from_result(result), self._schema)
            known = self._statements[name] = (text, order)
        return known

    def _flush(self) -> None:
        while self._pgconn.flush():
            if not select.select([], [self._fd], [], SEND_TIMEOUT)[1]:
                raise psycopg.OperationalError(f"the server has read nothing for {SEND_TIMEOUT:g} s")

    def receive(self) -> list[tuple[Any, ...]] | None:
        """Take in what has arrived; return the rows of the statement under way once they are complete, else None."""
        try:
            self._pgconn.consume_input()
            while self.current is not None and not self._pgconn.is_busy():
                result = self._pgconn.get_result()
                if result is None:
                    return self._finish()
                self._results.append(result)
        except psycopg.OperationalError as error:
            raise StoreUnavailable(f"lost the broker connection: {error}") from error
        if self._pgconn.status != pq.ConnStatus.OK:
            raise StoreUnavailable("lost the broker connection")
        return None

    def _finish(self) -> list[tuple[Any, ...]]:
        results, self._results, self.current = self._results, [], None
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise translate(psycopg.errors.error_from_result(result), self._schema)
        last = results[-1]
        if last.status != pq.ExecStatus.TUPLES_OK:
            return []
        transformer = Transformer(self._connection)
        transformer.set_pgresult(last)
        return cast("list[tuple[Any, ...]]", transformer.load_rows(0, last.ntuples, tuple))

    def notifications(self) -> list[str]:
        """Return the payloads of the notifications that have arrived."""
        payloads = []
        while (note := self._pgconn.notifies()) is not None:
            payloads.append(note.extra.decode())
        return payloads

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def readable(fds: Sequence[int], timeout: float) -> set[int]:
    """Return which descriptors can be read within ``timeout`` seconds; lets other greenlets run meanwhile.

    gevent and eventlet replace the functions of ``select`` (eventlet takes ``poll`` away), not those of ``selectors``.
    """
    if hasattr(select, "poll"):
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(timeout * 1000)}
    return set(select.select(fds, [], [], timeout)[0])
