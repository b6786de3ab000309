"""The short way to execute one statement: the same answers and errors as the driver's."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import psycopg
import pytest

from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import StoreError, StoreUnavailable
from pgqrs_celery.prepared import Prepared, bytea
from pgqrs_celery.session import Session
from tests.support.waiting import wait_for

SERIES = "SELECT generate_series(1, %(up_to)s::int) AS n WHERE %(again)s::int = %(up_to)s::int AND 7 %% 2 = 1"


def count_rows(connection: psycopg.Connection[Any], name: str, text: str, params: dict[str, Any]) -> int:
    return Prepared.of(connection).execute(name, text, params).command_tuples or 0


@pytest.fixture
def connection(database_dsn: str) -> psycopg.Connection[tuple[int]]:
    """An autocommit connection."""
    return psycopg.connect(database_dsn, autocommit=True)


def test_it_counts_the_rows_each_time(connection: psycopg.Connection[tuple[int]]) -> None:
    with connection:
        counts = [count_rows(connection, "series", SERIES, {"up_to": str(n), "again": str(n)}) for n in (3, 0, 5)]
        assert counts == [3, 0, 5]
        assert count_rows(connection, "series", SERIES, {"up_to": "1", "again": None}) == 0
        assert connection.execute("SELECT 1").fetchone() == (1,), "the driver goes on with the connection"


VALUES = {"a": UUID(int=7), "b": True, "c": 2**40, "d": 0.1, "e": 'é"\\', "f": b"\x00\xff", "g": None}
ECHO = """
    SELECT %(a)s::uuid, %(b)s::boolean, %(c)s::bigint, %(d)s::float8, %(e)s::text, %(f)b::bytea, %(g)s::json
"""


def test_values_arrive_as_the_driver_would_send_them_inside_and_outside_a_transaction(database: Database) -> None:
    texts = {"echo": ECHO}
    with database.session() as found:
        session = Session(found.connection, texts)
        outside = [session.quick_row("echo", VALUES) for _ in range(2)]
        with found.connection.transaction():
            inside = session.quick_row("echo", VALUES)
        unprepared = Session(found.connection, texts)
        found.connection.prepare_threshold = None
        assert [unprepared.quick_row("echo", VALUES), inside, *outside] == [
            (str(UUID(int=7)).encode(), b"t", b"1099511627776", b"0.1", 'é"\\'.encode(), b"\\x00ff", None)
        ] * 4
        assert session.quick_row("echo", VALUES | {"b": False})[1] == b"f"  # type: ignore[index]


def test_bytes_are_not_taken_for_text(connection: psycopg.Connection[tuple[int]]) -> None:
    with connection, pytest.raises(TypeError, match="bytes are a parameter marked"):
        count_rows(connection, "echo", "SELECT %(f)s::bytea", {"f": b"\\x00"})


def test_large_parameters_are_sent_whole(connection: psycopg.Connection[tuple[int]]) -> None:
    text = "SELECT 1 WHERE length(%(text)s::text) = 50000000"
    with connection:
        assert count_rows(connection, "large", text, {"text": "x" * 50_000_000}) == 1


def test_an_error_of_the_statement_is_the_drivers_and_leaves_the_connection_usable(
    connection: psycopg.Connection[tuple[int]],
) -> None:
    with connection:
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            count_rows(connection, "series", SERIES, {"up_to": "many", "again": "1"})
        with pytest.raises(psycopg.errors.UndefinedTable):
            count_rows(connection, "missing", "SELECT FROM no_such_table", {})
        assert count_rows(connection, "series", SERIES, {"up_to": "2", "again": "2"}) == 2


def test_it_is_prepared_anew_after_the_driver_has_deallocated_everything(
    connection: psycopg.Connection[tuple[int]],
) -> None:
    def known() -> list[tuple[int]]:
        return connection.execute("SELECT count(*) FROM pg_prepared_statements WHERE name = 'pgqrs_one'").fetchall()

    with connection:
        connection.prepare_threshold = 0
        connection.execute("SELECT 1")
        assert count_rows(connection, "one", "SELECT 1", {}) == 1
        assert known() == [(1,)]
        with connection.transaction(force_rollback=True):
            connection.execute("SELECT 1")
        assert known() == [(0,)]
        assert [count_rows(connection, "one", "SELECT 1", {}) for _ in range(2)] == [1, 1]
        assert known() == [(1,)]


def test_what_was_prepared_after_the_driver_had_deallocated_the_rest_stays_as_it_is(
    connection: psycopg.Connection[tuple[int]],
) -> None:
    with connection:
        connection.prepare_threshold = 0
        connection.execute("SELECT 1")
        assert count_rows(connection, "before", "SELECT 1", {}) == 1
        with connection.transaction(force_rollback=True):
            connection.execute("SELECT 1")
        connection.execute("SELECT 1")
        for name in ("after", "before", "after"):
            assert count_rows(connection, name, "SELECT 1", {}) == 1


def test_a_statement_whose_preparation_was_interrupted_is_prepared_again(
    connection: psycopg.Connection[tuple[int]],
) -> None:
    with connection:
        connection.pgconn.prepare(b"pgqrs_one", b"SELECT 'another one'")
        result = Prepared.of(connection).execute("one", "SELECT 1", {})
        assert result.get_value(0, 0) == b"1"


@pytest.mark.parametrize("known", [False, True])
def test_a_closed_connection_is_refused(connection: psycopg.Connection[tuple[int]], known: bool) -> None:
    session = Session(connection, {"one": "SELECT 1"})
    if known:
        session.quick_row("one", {})
    connection.close()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        session.quick_row("one", {})


def test_a_server_that_hangs_up_in_mid_statement_is_unavailable(database: Database, database_dsn: str) -> None:
    with psycopg.connect(database_dsn, autocommit=True) as killer:

        def kill() -> bool:
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
            )
            return bool(killer.execute(query, [f"%sleep for {database.schema}%"]).fetchall())

        killing = threading.Thread(target=lambda: wait_for(kill, 30))
        killing.start()
        with pytest.raises(StoreUnavailable), database.session() as session:
            count_rows(session.connection, "nap", f"SELECT pg_sleep(60) -- sleep for {database.schema}", {})
        killing.join()
    with database.session() as session:
        assert count_rows(session.connection, "one", "SELECT 1", {}) == 1


def test_other_errors_are_the_packages(database: Database) -> None:
    with pytest.raises(StoreError, match="refused"), database.session() as session:
        count_rows(session.connection, "wrong", "SELECT 1 / %(by)s::int", {"by": "0"})


def test_a_text_that_the_server_would_cut_short_is_refused(connection: psycopg.Connection[tuple[int]]) -> None:
    with connection, pytest.raises(psycopg.DataError, match="NUL"):
        count_rows(connection, "one", "SELECT 1 WHERE %(text)s::text <> ''", {"text": "cut\x00short"})


def test_text_is_what_it_was_whatever_encoding_the_environment_names(
    database_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    database = Database(database_dsn)
    with database.session() as session:
        row = Session(session.connection, {"echo": "SELECT %(text)s::text"}).quick_row("echo", {"text": "Größe €"})
    database.close()
    assert row == ("Größe €".encode(),)


@pytest.mark.parametrize("output", ["hex", "escape"])
def test_bytes_come_back_in_either_form_the_server_writes(
    connection: psycopg.Connection[tuple[int]], output: str
) -> None:
    with connection:
        connection.execute(f"SET bytea_output = {output}".encode())
        result = Prepared.of(connection).execute("bytes", "SELECT %(value)b::bytea", {"value": b"\x00\\ab\xff"})
        text = result.get_value(0, 0)
        assert text is not None
        assert bytea(text) == b"\x00\\ab\xff"


@pytest.mark.parametrize("known", [False, True])
def test_a_session_that_ended_with_its_server_is_a_lost_connection(
    known: bool, own_postgres: embedded.PostgresServer
) -> None:
    database = Database(own_postgres.dsn())
    with database.session() as found:
        session = Session(found.connection, {"one": "SELECT 1"})
        if known:
            session.quick_row("one", {})
    own_postgres.restart(immediate=True)  # the server's farewell is read before the end of the connection is
    with pytest.raises(StoreUnavailable), database.session() as found:
        Session(found.connection, {"one": "SELECT 1"}).quick_row("one", {})
    database.close()
