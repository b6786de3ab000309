"""The database goes away, restarts, hangs up; a pooler sits in between; messages are broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery

from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.store import messages, migrations
from pgqrs_celery.store.messages import NewMessage
from tests.broker.test_workers import count, send, wait_until_empty
from tests.broker.workers import Bench, application
from tests.support.processes import in_child
from tests.support.waiting import wait_for


@pytest.fixture
def own_database(own_postgres: embedded.PostgresServer) -> Iterator[Database]:
    """A schema on a server of the test's own."""
    database = Database(own_postgres.dsn(), schema="own")
    migrations.install(database)
    yield database
    database.close()


@pytest.fixture
def own_bench(tmp_path: Path, own_database: Database, own_postgres: embedded.PostgresServer) -> Iterator[Bench]:
    """Workers on that server."""
    bench = Bench(tmp_path, f"pgqrs+{own_postgres.dsn()}&pgqrs_schema=own")
    yield bench
    bench.stop()


def send_patiently(client: Celery, task: str, *args: Any) -> None:
    """Send although the database may be away just now."""
    policy = {"max_retries": None, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5}
    send(client, task, *args, retry=True, retry_policy=policy)


@pytest.mark.parametrize("how", ["fast", "immediate", "crash"])
def test_a_restart_of_postgres_under_load_loses_nothing(
    how: str, own_bench: Bench, own_postgres: embedded.PostgresServer, own_database: Database
) -> None:
    worker = own_bench.worker("-c", "2")
    client = application(own_bench.url)
    send(client, "linger", "through", 4)
    own_bench.wait_for_entries(1, "linger")
    for n in range(300):
        send_patiently(client, "record", n)
        if n == 100:
            if how == "crash":
                own_postgres.crash()
            else:
                own_postgres.restart(immediate=how == "immediate")
    # What was unacknowledged is executed twice: the number of entries says nothing.
    wait_for(
        lambda: {e["value"] for e in own_bench.entries("record")} == set(range(300)), 60, "every message to be executed"
    )
    own_bench.wait_for_entries(1, "lingered")
    wait_until_empty(own_database)
    assert worker.process.poll() is None
    assert "Unrecoverable" not in worker.text
    # What was running kept its message over the restart.
    assert len(own_bench.entries("linger")) == 1
    client.close()


def test_a_child_forked_while_a_thread_connects_can_send(connection: kombu.Connection) -> None:
    broker = connection.transport.broker
    with ExitStack() as everything:
        for _ in range(broker.settings.pool_size):
            everything.enter_context(broker.database.session())
        connecting = threading.Thread(target=broker.check)
        connecting.start()
        wait_for(broker._checking.locked, 10, "the thread to wait for a connection")

        def send() -> bool:
            sending = threading.Thread(target=broker.check, daemon=True)
            sending.start()
            sending.join(20)
            return not sending.is_alive()

        assert in_child(send) == "True"
    connecting.join()


def terminate(database: Database) -> None:
    """End every other session of the database."""
    with database.session() as session:
        session.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database() AND backend_type = 'client backend'"
        )


def test_cut_connections_are_made_again_and_keep_their_messages(own_bench: Bench, own_database: Database) -> None:
    worker = own_bench.worker("-c", "1", conf={"worker_prefetch_multiplier": 2})
    client = application(own_bench.url)
    send(client, "linger", "x", 3)
    send(client, "record", "prefetched")
    own_bench.wait_for_entries(1, "linger")
    wait_for(lambda: count(own_database, "leased_by IS NOT NULL") == 2, 5, "both to be prefetched")
    for _ in range(3):
        terminate(own_database)
        send_patiently(client, "record", "more")
    own_bench.wait_for_entries(4, "record")
    wait_until_empty(own_database)
    assert len(own_bench.entries("linger")) == 1
    assert len(own_bench.entries("record", "prefetched")) == 1
    assert client.control.ping(timeout=3, limit=1) == [{worker.name: {"ok": "pong"}}]
    client.close()


#: Ends the sessions of the first five who give a leased message a new owner, or a former consumer up.
CUTTING = """
CREATE SEQUENCE own.cuts;
CREATE FUNCTION own.cut() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF nextval('own.cuts') <= 5 THEN
    PERFORM pg_terminate_backend(pg_backend_pid());
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER cut BEFORE UPDATE ON own.pgqrs_messages FOR EACH ROW
  WHEN (OLD.leased_by IS NOT NULL AND NEW.leased_by <> OLD.leased_by) EXECUTE FUNCTION own.cut();
CREATE TRIGGER cut BEFORE UPDATE ON own.pgqrs_consumers FOR EACH ROW
  WHEN (NEW.dead_at IS NOT NULL) EXECUTE FUNCTION own.cut();
"""


def test_a_reconnection_that_is_cut_short_again_and_again_keeps_the_messages(
    own_bench: Bench, own_database: Database
) -> None:
    own_bench.worker("-c", "1", conf={"worker_prefetch_multiplier": 2})
    client = application(own_bench.url)
    send(client, "linger", "x", 4)
    send(client, "record", "prefetched")
    own_bench.wait_for_entries(1, "linger")
    wait_for(lambda: count(own_database, "leased_by IS NOT NULL") == 2, 5, "both to be prefetched")
    with own_database.session() as session:
        session.connection.execute(CUTTING)
    terminate(own_database)
    send_patiently(client, "record", "after")
    own_bench.wait_for_entries(1, "record", "after")
    wait_until_empty(own_database)
    with own_database.session() as session:
        cuts = session.connection.execute("SELECT last_value FROM own.cuts").fetchone()
    assert cuts is not None
    assert cuts[0] > 5
    assert len(own_bench.entries("linger")) == 1
    assert len(own_bench.entries("record", "prefetched")) == 1
    client.close()


def test_an_acknowledgement_survives_an_outage(
    own_bench: Bench, own_postgres: embedded.PostgresServer, own_database: Database
) -> None:
    own_bench.worker("-c", "1")
    client = application(own_bench.url)
    send(client, "linger", "x", 1.5)
    own_bench.wait_for_entries(1, "linger")
    own_postgres.stop()
    own_bench.wait_for_entries(1, "lingered")
    own_postgres.start()
    wait_until_empty(own_database)
    assert len(own_bench.entries("linger")) == 1
    client.close()


#: Refuses the first deletion of a message.
REFUSING = """
CREATE SEQUENCE own.refusals;
CREATE FUNCTION own.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF nextval('own.refusals') = 1 THEN
    RAISE EXCEPTION 'not now';
  END IF;
  RETURN OLD;
END $$;
CREATE TRIGGER refuse BEFORE DELETE ON own.pgqrs_messages FOR EACH ROW EXECUTE FUNCTION own.refuse();
"""


def test_an_acknowledgement_that_the_server_refused_is_sent_again_though_nothing_happens(
    own_bench: Bench, own_database: Database
) -> None:
    with own_database.session() as session:
        session.connection.execute(REFUSING)
    worker = own_bench.worker("-c", "1", pushed_only=True)
    client = application(own_bench.url)
    send(client, "record", "x")
    worker.wait_until_it_says("not now")
    wait_until_empty(own_database)
    client.close()


def test_a_worker_waits_for_a_database_that_is_not_up_yet(
    own_bench: Bench, own_postgres: embedded.PostgresServer, own_database: Database
) -> None:
    own_database.close()
    own_postgres.stop()
    worker = own_bench.start("-c", "1")
    worker.wait_until_it_says("Cannot connect")
    own_postgres.start()
    worker.wait_until_ready()
    client = application(own_bench.url)
    send(client, "record", 1)
    own_bench.wait_for_entries(1)
    client.close()


def test_a_worker_without_a_schema_ends_and_says_what_to_run(bench: Bench, database: Database) -> None:
    bench.url = bench.url.replace(database.schema, "nowhere")
    with pytest.raises(AssertionError, match="pgqrs install"):
        bench.worker("-c", "1")


def test_a_message_that_cannot_be_decoded_is_buried_and_the_worker_lives(
    bench: Bench, client: Celery, database: Database
) -> None:
    worker = bench.worker("-c", "1")
    headers = '{"task": "tests.broker.application.record", "id": "1", "lang": "py"}'
    json_body = '{"content_type": "application/json", "content_encoding": "utf-8"}'
    broken = [
        (headers, json_body, b"{not json"),
        (headers, json_body, b"\xff\xfe"),
        (headers, '{"content_type": "application/x-python-serialize", "content_encoding": "binary"}', b"x"),
        (headers, '{"content_type": "application/nonsense", "content_encoding": "x-none"}', b"x"),
        (headers.replace('"py"', '"py", "compression": "application/x-gzip"'), json_body, b"not compressed"),
        ("{broken", json_body, b"[[], {}, {}]"),
        ('["a list"]', json_body, b"[[], {}, {}]"),
    ]
    with database.session() as session:
        new = [NewMessage(messages.new_id(), "", "celery", h, p, b) for h, p, b in broken]
        messages.publish(session, new)
    send(client, "record", "after")
    bench.wait_for_entries(1, "record", "after")
    wait_for(lambda: count(database, "queue = 'pgqrs.dead'") == len(broken), 10, "all to be buried")
    assert count(database, "queue = 'pgqrs.dead' AND headers::json ->> 'x-death' IS NULL") == 0
    assert worker.process.poll() is None


def test_a_task_nobody_knows_is_dropped_as_amqp_does(bench: Bench, client: Celery, database: Database) -> None:
    bench.worker("-c", "1")
    client.send_task("unknown.task")
    send(client, "record", 1)
    bench.wait_for_entries(1)
    wait_until_empty(database)


@pytest.mark.parametrize(("mode", "direct"), [("transaction", False), ("transaction", True), ("session", False)])
def test_a_pooler_may_sit_in_between(
    mode: str,
    direct: bool,
    pgbouncer: Callable[[str], str],
    tmp_path: Path,
    database: Database,
    database_dsn: str,
) -> None:
    url = f"pgqrs+{pgbouncer(mode)}?pgqrs_schema={database.schema}&pgqrs_prepared_statements=false"
    bench = Bench(tmp_path, url)
    client = application(url)
    try:
        deaf = mode == "transaction" and not direct
        options = {"listen_dsn": database_dsn} if direct else {}
        worker = bench.worker("-c", "2", options=options, pushed_only=not deaf)
        assert ("transaction pooler" in worker.text) == deaf
        for n in range(100):
            send(client, "record", n)
        send(client, "record", "later", countdown=1)
        bench.wait_for_entries(101, "record")
        began = time.time()
        send(client, "record", "latency")
        (entry,) = bench.wait_for_entries(1, "record", "latency")
        if deaf:  # who is not told looks often
            assert entry["at"] - began < 1.5
        wait_until_empty(database)
        assert worker.end() == 0
    finally:
        bench.stop()
        client.close()
