"""The pool: bounded, shared by threads, not by forks; errors come out as ours, and a restart is lived through."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from pgqrs_celery import embedded
from pgqrs_celery.db import Database, notifications
from pgqrs_celery.exceptions import ConfigurationError, NotInstalled, StoreError, StoreUnavailable
from pgqrs_celery.session import Session
from pgqrs_celery.store import steps
from tests.support.processes import in_child
from tests.support.waiting import wait_for


def pid(session: Session) -> int:
    return session.connection.info.backend_pid


def ask(session: Session) -> int:
    row = session.connection.execute("SELECT 1").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def small(database_dsn: str) -> Iterator[Database]:
    """A pool of two connections to a schema that does not exist."""
    database = Database(database_dsn, schema="nowhere", pool_size=2, application_name="pgqrs small")
    yield database
    database.close()


@pytest.fixture
def mortal(own_postgres: embedded.PostgresServer) -> Iterator[Database]:
    """A pool on a server that can be stopped."""
    database = Database(own_postgres.dsn(), connect_timeout=1)
    yield database
    database.close()


def test_a_connection_is_used_again(small: Database) -> None:
    with small.session() as session:
        first = pid(session)
    with small.session() as session:
        assert pid(session) == first


def test_a_connection_says_who_it_is(small: Database) -> None:
    with small.session() as session:
        row = session.connection.execute("SHOW application_name").fetchone()
    assert row == ("pgqrs small",)


def test_there_are_never_more_connections_than_the_pool_has(small: Database) -> None:
    seen: set[int] = set()
    inside, most, lock = 0, 0, threading.Lock()

    def use(_: int) -> None:
        nonlocal inside, most
        with small.session() as session:
            with lock:
                inside += 1
                most = max(most, inside)
                seen.add(pid(session))
            session.connection.execute("SELECT pg_sleep(0.002)")
            with lock:
                inside -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(40)))
    assert most == 2
    assert len(seen) <= 2


def test_who_holds_a_connection_gets_a_second_one_however_many_wait(small: Database) -> None:
    everybody = threading.Barrier(2)

    def use(_: int) -> int:
        with small.session():
            everybody.wait(10)  # both connections of the pool are lent now
            with small.session() as second:
                return pid(second)

    with ThreadPoolExecutor(2) as threads:
        extra = list(threads.map(use, range(2)))
    with small.session() as one, small.session() as two:
        assert {pid(one), pid(two)}.isdisjoint(extra)  # those were closed


def test_every_statement_commits_by_itself_and_a_transaction_as_a_whole(database: Database) -> None:
    def count() -> int:
        with database.session() as other:
            row = other.connection.execute("SELECT count(*) FROM pg_temp.t").fetchone()
        assert row is not None
        return int(row[0])

    with database.session() as session:
        session.connection.execute("CREATE TEMP TABLE t (n int)")
        session.connection.execute("INSERT INTO t VALUES (1)")
    assert count() == 1

    class Stop(Exception):
        pass

    def fail() -> None:
        with database.transaction() as session:
            session.connection.execute("INSERT INTO pg_temp.t VALUES (2)")
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert count() == 1


def test_a_connection_left_in_a_transaction_is_not_used_again(small: Database) -> None:
    with small.session() as session:
        first = pid(session)
        session.connection.execute("BEGIN")
    with small.session() as session:
        assert pid(session) != first


def test_a_missing_schema_is_named_with_what_to_run(small: Database) -> None:
    with pytest.raises(NotInstalled, match=r"schema 'nowhere'.*Run `celery -A your_app pgqrs install`"):
        small.call(lambda session: steps.peek(session, "x"))


def test_an_error_in_a_statement_is_ours_and_the_connection_survives_it(small: Database) -> None:
    with small.session() as session:
        first = pid(session)
    with pytest.raises(StoreError, match="the database refused a statement") as caught, small.session() as session:
        session.connection.execute("SELECT 1/0")
    assert not isinstance(caught.value, StoreUnavailable)
    assert isinstance(caught.value.__cause__, psycopg.Error)
    with small.session() as session:
        assert pid(session) == first


def test_an_error_of_the_caller_s_own_passes_through(small: Database) -> None:
    with pytest.raises(ZeroDivisionError), small.session():
        _ = 1 / 0


def test_a_dsn_that_cannot_be_read_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="the DSN cannot be read"):
        Database("host = = 1").connect()


def test_a_wrong_database_is_unavailable_without_the_password(database_dsn: str) -> None:
    dsn = psycopg.conninfo.make_conninfo(database_dsn, dbname="nosuch", password="hunter2")
    with pytest.raises(StoreUnavailable, match='database "nosuch" does not exist') as caught:
        Database(dsn).call(lambda session: None)
    assert "hunter2" not in str(caught.value)


def test_a_dsn_may_be_found_out_at_first_use(database_dsn: str) -> None:
    asked = []

    def find() -> str:
        asked.append(1)
        return database_dsn

    database = Database(find)
    assert asked == []
    with database.session(), database.session():
        pass
    assert asked == [1]
    database.close()


@pytest.mark.parametrize(("durable", "setting"), [(True, "on"), (False, "off")])
def test_synchronous_commit_is_what_the_settings_say(database_dsn: str, durable: bool, setting: str) -> None:
    database = Database(database_dsn, synchronous_commit=durable)
    with database.session() as session:
        assert session.durable == setting
        assert session.connection.execute("SHOW synchronous_commit").fetchone() == (setting,)
    database.close()


# --- forks


def test_a_child_uses_connections_of_its_own_and_leaves_the_parent_s_alone(small: Database) -> None:
    with small.session() as session:
        mine = pid(session)

    def child() -> int:
        with small.session() as session:
            session.connection.execute("SELECT 1")
            return pid(session)

    answer = in_child(child)
    assert answer.isdigit(), answer
    assert int(answer) != mine
    with small.session() as session:
        assert session.connection.execute("SELECT 1").fetchone() == (1,)
        assert pid(session) == mine


def test_a_child_forked_while_connections_are_lent_has_the_whole_pool(small: Database) -> None:
    def child() -> int:
        with small.session() as one, small.session() as two:
            return len({pid(one), pid(two)})

    with small.session() as first, small.session():
        assert in_child(child) == "2"
        assert first.connection.execute("SELECT 1").fetchone() == (1,)


def test_the_end_of_a_child_does_not_end_the_parent_s_sessions(small: Database) -> None:
    with small.session() as session:
        assert in_child(lambda: small.close()) == "None"
        assert session.connection.execute("SELECT 1").fetchone() == (1,)


# --- restarts


def test_a_connection_that_was_cut_while_idle_is_replaced_unnoticed(small: Database) -> None:
    with small.session() as one, small.session() as two:
        pids = [pid(one), pid(two)]
    with psycopg.connect(small.dsn, autocommit=True) as killer:
        for victim in pids:
            killer.execute("SELECT pg_terminate_backend(%s, 10000)", [victim])
    assert small.call(lambda session: session.connection.execute("SELECT 7").fetchone()) == (7,)
    with small.session() as one, small.session() as two:
        assert not {pid(one), pid(two)} & set(pids)


def test_work_cut_short_is_done_again_on_a_new_connection(small: Database) -> None:
    tries = []

    def work(session: Session) -> int:
        tries.append(pid(session))
        if len(tries) == 1:
            session.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return len(tries)

    assert small.call(work) == 2
    assert len(set(tries)) == 2


def test_a_transaction_cut_short_is_done_again_as_a_whole(database: Database) -> None:
    with database.session() as session:
        session.connection.execute(f"CREATE TABLE {database.schema}.t (n int)".encode())
    tries = []

    def work(session: Session) -> None:
        tries.append(1)
        session.connection.execute(f"INSERT INTO {database.schema}.t VALUES (1)".encode())
        if len(tries) == 1:
            session.connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    database.call(work, transaction=True)
    with database.session() as session:
        row = session.connection.execute(f"SELECT count(*) FROM {database.schema}.t".encode()).fetchone()
    assert row == (1,)


def test_who_falls_silent_in_a_transaction_does_not_keep_its_locks(small: Database) -> None:
    small.silence = 0.2
    lock = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"

    def stall(session: Session) -> int:
        session.connection.execute(lock, [str(pid(session))])
        with psycopg.connect(small.dsn, autocommit=True) as other:
            other.execute(lock, [str(pid(session))])  # waits until the server has given the silent one up
        return ask(session)

    with pytest.raises(StoreUnavailable, match="idle-in-transaction"):
        small.call(stall, transaction=True)
    small.silence = 60.0  # which a busy machine does not exceed by itself
    with small.transaction() as session:
        assert ask(session) == 1
    with small.session() as session:
        row = session.connection.execute("SHOW idle_in_transaction_session_timeout").fetchone()
    assert row == ("0",)


def test_without_patience_an_absent_database_is_an_error_at_once(
    mortal: Database, own_postgres: embedded.PostgresServer
) -> None:
    own_postgres.stop()
    calls: list[Session] = []
    with pytest.raises(StoreUnavailable, match="cannot connect to"):
        mortal.call(calls.append)
    assert calls == []


def test_with_patience_work_is_done_when_the_database_is_back(
    mortal: Database, own_postgres: embedded.PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert mortal.call(ask) == 1
    own_postgres.stop()
    with caplog.at_level(logging.WARNING, "pgqrs_celery.db"), ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: mortal.call(ask, patience=60))
        wait_for(lambda: "trying again for 60 s" in caplog.text, what="the warning")
        assert not waiting.done()
        own_postgres.start()
        assert waiting.result(60) == 1


def test_waiting_ends_when_it_is_told_to(mortal: Database, own_postgres: embedded.PostgresServer) -> None:
    own_postgres.stop()
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: mortal.call(ask, patience=3600, stop=stop))
        stop.set()
        with pytest.raises(StoreUnavailable):
            waiting.result(30)


def test_a_listening_connection_that_is_lost_says_so(small: Database) -> None:
    connection = small.connect()
    connection.execute("LISTEN something")
    with small.session() as session:
        session.connection.execute("NOTIFY something, 'x'")
        assert list(notifications(connection, 10)) == ["x"]
        assert list(notifications(connection, 0.01)) == []
        session.connection.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
    with pytest.raises(StoreUnavailable, match="lost the listening connection"):
        notifications(connection, 10)
