"""Remote control, events, queues, priorities, expiry and ETAs with real workers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import ChannelError

from pgqrs_celery import outbox
from pgqrs_celery.db import Database
from pgqrs_celery.embedded import PostgresServer
from pgqrs_celery.store import migrations
from tests.broker.test_workers import TASKS, consumers, count, send, wait_until_empty
from tests.broker.workers import Bench, application
from tests.support.events import collected_events
from tests.support.waiting import wait_for


@pytest.fixture
def bench(tmp_path: Path, broker_url: str) -> Iterator[Bench]:
    """Workers that store their results in the same schema."""
    bench = Bench(tmp_path, broker_url, backend=broker_url)
    yield bench
    bench.stop()


@pytest.fixture
def client(broker_url: str) -> Iterator[Celery]:
    """An app that waits for results."""
    app = application(broker_url, broker_url)
    yield app
    app.close()


def test_a_worker_answers_and_obeys(bench: Bench, client: Celery, database: Database) -> None:
    name = bench.worker("-c", "1").name
    control, inspect = client.control, client.control.inspect([name], timeout=5)
    assert inspect.ping() == {name: {"ok": "pong"}}
    assert [q["name"] for q in inspect.active_queues()[name]] == ["celery"]
    assert inspect.stats()[name]["prefetch_count"] == 4
    control.pool_grow(2, destination=[name], reply=True, timeout=5)
    wait_for(lambda: inspect.stats()[name]["prefetch_count"] == 12, 10, "the prefetch to grow")
    for _ in range(2):  # billiard refuses while it has not noticed yet that a new process is idle
        wait_for(
            lambda: "ok" in control.pool_shrink(1, destination=[name], reply=True, timeout=5)[0][name],
            10,
            "a shrinking",
        )
    wait_for(lambda: inspect.stats()[name]["prefetch_count"] == 4, 10, "the prefetch to shrink")
    control.add_consumer("other", destination=[name], reply=True, timeout=5)
    send(client, "record", "other", queue="other")
    bench.wait_for_entries(1, "record", "other")
    control.cancel_consumer("other", destination=[name], reply=True, timeout=5)
    assert [q["name"] for q in inspect.active_queues()[name]] == ["celery"]
    control.rate_limit(TASKS + "record", "10/m", destination=[name], reply=True, timeout=5)
    for n in range(3):
        send(client, "record", n)
    bench.wait_for_entries(2, "record")
    wait_for(lambda: count(database, "leased_by IS NOT NULL") == 2, 5, "the limited ones to be held")
    assert len(bench.entries("record")) == 2


def test_a_broadcast_reaches_every_worker(bench: Bench, client: Celery) -> None:
    names = {bench.worker("-c", "1").name for _ in range(3)}
    replies = client.control.ping(timeout=5, limit=3)
    assert {name for reply in replies for name in reply} == names


def test_a_revoked_task_does_not_run(bench: Bench, client: Celery, database: Database) -> None:
    bench.worker("-c", "1")
    busy = send(client, "linger", "busy", 30)
    bench.wait_for_entries(1, "linger")
    waiting = send(client, "record", "never")
    later = send(client, "record", "never", countdown=1)
    client.control.revoke([waiting.id, later.id], reply=True, timeout=5, limit=1)
    client.control.revoke(busy.id, terminate=True, reply=True, timeout=5, limit=1)
    for result in (busy, waiting, later):
        assert wait_for(lambda r=result: r.status == "REVOKED", 15, result.id)
    assert bench.entries("record") == []
    wait_until_empty(database)


def test_events_reach_a_receiver(bench: Bench, client: Celery) -> None:
    with collected_events(client, begun=False) as events:
        worker = bench.worker("-c", "1", "-E")
        wait_for(lambda: "worker-heartbeat" in events.types(), 15, f"a heartbeat: {worker.text}")
        send(client, "record", 1)
        wait_for(lambda: "task-succeeded" in events.types(), 10, f"an event: {events.types()}")
    assert {"task-received", "task-started", "task-succeeded"} <= events.types()


def test_an_expired_task_is_revoked_not_forgotten(bench: Bench, client: Celery, database: Database) -> None:
    result = send(client, "record", "too late", expires=0.5)
    wait_for(lambda: datetime.now(UTC) > sent_at(database) + timedelta(seconds=1), 5, "the task to expire")
    bench.worker("-c", "1")
    wait_for(lambda: result.status == "REVOKED", 10, "the worker to revoke it")
    assert bench.entries() == []
    wait_until_empty(database)


def sent_at(database: Database) -> datetime:
    with database.session() as session:
        row = session.connection.execute(f'SELECT max(sent_at) FROM "{database.schema}".pgqrs_messages').fetchone()
    assert row
    found: datetime = row[0]
    return found


def test_priorities_are_amqp_s_higher_first(bench: Bench, client: Celery) -> None:
    for priority in (0, 5, 9, 3):
        send(client, "record", priority, priority=priority)
    bench.worker("-c", "1", conf={"worker_prefetch_multiplier": 1})
    entries = bench.wait_for_entries(4, "record")
    assert [e["value"] for e in entries] == [9, 5, 3, 0]


def test_etas_wait_in_the_database_and_not_in_a_worker(bench: Bench, client: Celery, database: Database) -> None:
    worker = bench.worker("-c", "1", pushed_only=True)
    inspect = client.control.inspect([worker.name], timeout=20)
    with outbox.batch():
        for _ in range(200):
            send(client, "record", "never", countdown=3600)
    assert inspect.stats()[worker.name]["prefetch_count"] == 4
    assert count(database, "leased_by IS NOT NULL") == 0
    soon = datetime.now(UTC) + timedelta(seconds=3)
    with outbox.batch():
        for n in range(200):
            send(client, "record", n, eta=soon)
    assert inspect.stats()[worker.name]["prefetch_count"] == 4
    assert count(database, f"leased_by IS NOT NULL AND clock_timestamp() < '{soon}'") == 0
    entries = bench.wait_for_entries(200, "record")
    assert min(e["at"] for e in entries) >= soon.timestamp()
    # The task still knows its ETA.
    assert {e["eta"] for e in entries} == {soon.isoformat()}
    wait_for(lambda: count(database) == 200, what="the others to stay")


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_countdown_is_kept_to_the_moment(pool: str, bench: Bench, client: Celery) -> None:
    bench.worker("-P", pool, "-c", "1", pushed_only=True)
    for n, countdown in enumerate((0.3, 1, 2)):
        due = time.time() + countdown
        send(client, "record", n, countdown=countdown)
        assert bench.wait_for_entries(1, "record", n)[0]["at"] >= due


def test_scheduled_tasks_can_be_inspected(bench: Bench, client: Celery) -> None:
    worker = bench.worker("-c", "1")
    result = send(client, "record", "later", countdown=3600)
    (found,) = client.control.inspect([worker.name], timeout=5).scheduled()[worker.name]
    assert found["request"]["id"] == result.id
    assert found["request"]["args"] == ["later"]
    assert found["request"]["name"] == TASKS + "record"


def test_a_purge_empties_the_queues(client: Celery, database: Database) -> None:
    for n in range(5):
        send(client, "record", n, countdown=n * 100)
    assert client.control.purge() == 5
    assert count(database) == 0


def test_a_passive_declaration_counts_and_does_not_create(connection: kombu.Connection) -> None:
    channel = connection.channel()
    with pytest.raises(ChannelError, match="NOT_FOUND"):
        channel.queue_declare("q", passive=True)
    channel.queue_declare("q", durable=True)
    for _ in range(3):
        connection.Producer().publish("x", routing_key="q")
    assert channel.queue_declare("q", passive=True).message_count == 3


def test_a_queue_that_is_used_or_full_is_kept_if_asked(connection: kombu.Connection) -> None:
    channel = connection.channel()
    queue = kombu.Queue("q")(channel)
    queue.declare()
    connection.Producer().publish("x", routing_key="q")
    channel.queue_delete("q", if_empty=True)
    assert channel.queue_declare("q", passive=True).message_count == 1
    with connection.Consumer([queue], on_message=lambda m: None):
        channel.queue_delete("q", if_unused=True)
        assert channel.queue_declare("q", passive=True).consumer_count == 1
    assert channel.queue_delete("q") == 1


def test_an_unknown_queue_option_is_told_once_and_a_wrong_one_is_refused(
    connection: kombu.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    channel = connection.channel()
    for _ in range(2):
        channel.queue_declare("odd", durable=True, arguments={"x-max-length": 10, "x-queue-type": "quorum"})
    assert [r.getMessage() for r in caplog.records if "x-max-length" in r.getMessage()] == [
        "queue odd: the argument x-max-length has no effect on the Postgres broker"
    ]
    with pytest.raises(ChannelError, match="x-message-ttl"):
        channel.queue_declare("odd", arguments={"x-message-ttl": "soon"})


def test_an_exchange_cannot_change_its_type(connection: kombu.Connection) -> None:
    channel = connection.channel()
    channel.exchange_declare("e", "topic")
    with pytest.raises(ChannelError, match="PRECONDITION_FAILED"):
        channel.exchange_declare("e", "fanout")
    with pytest.raises(ChannelError, match="headers"):
        channel.exchange_declare("h", "headers")


def test_a_volatile_queue_ends_with_its_consumer(connection: kombu.Connection, database: Database) -> None:
    queue = kombu.Queue("v", durable=False, auto_delete=True)
    with connection.Consumer([queue], on_message=lambda m: None):
        assert names(database) == ["v"]
    assert names(database) == []


def names(database: Database) -> list[str]:
    with database.session() as session:
        rows = session.connection.execute(f'SELECT name FROM "{database.schema}".pgqrs_queues').fetchall()
    return [row[0] for row in rows]


def test_who_has_asked_once_does_not_listen_for_ever(bench: Bench, client: Celery, database: Database) -> None:
    worker = bench.worker("-c", "1")
    assert client.control.ping(timeout=5, limit=1) == [{worker.name: {"ok": "pong"}}]

    def listening() -> list[int]:
        with database.session() as session:
            rows = session.connection.execute(
                f'SELECT DISTINCT pid FROM "{database.schema}".pgqrs_consumers'
            ).fetchall()
        return [row[0] for row in rows]

    assert listening() == [worker.process.pid]
    assert not [t for t in threading.enumerate() if t.name == "pgqrs-keeper"]


def test_results_by_rpc_arrive(tmp_path: Path, broker_url: str) -> None:
    bench = Bench(tmp_path, broker_url, backend="rpc://")
    client = application(broker_url, "rpc://")
    try:
        bench.worker("-c", "1")
        results: list[AsyncResult[Any]] = [send(client, "record", n) for n in range(5)]
        assert [r.get(timeout=10) for r in results] == [0, 1, 2, 3, 4]
    finally:
        bench.stop()
        client.backend.result_consumer.stop()  # type: ignore[attr-defined]
        client.close()


#: The keeper's look is the only statement that asks for this, and its sweep, every twenty seconds, the only one that
#: sets that.
LOOK, SWEEP = "AS registered", "SET used_at"
#: Looks that are measured over.
ROUNDS = 8


def test_an_idle_worker_costs_less_than_a_statement_a_second(tmp_path: Path, own_postgres: PostgresServer) -> None:
    database = Database(own_postgres.dsn())
    migrations.install(database)
    with database.session() as session:
        for setting in ("log_statement = 'all'", "log_line_prefix = '@%n '"):
            session.connection.execute(f"ALTER SYSTEM SET {setting}".encode())
        session.connection.execute("SELECT pg_reload_conf()")
    bench = Bench(tmp_path, f"pgqrs+{own_postgres.dsn()}")
    client = application(bench.url)
    try:
        bench.worker("-c", "2")
        send(client, "record", 1)
        bench.wait_for_entries(1)
        client.close()
        wait_for(lambda: consumers(database, "asleep") == 1, what="the worker to have nothing to do")
        database.close()
        began = time.time()
        moments = wait_for(lambda: between_sweeps(own_postgres, began), 60, f"{ROUNDS} looks without a sweep")
    finally:
        bench.stop()
    assert (len(moments) - 1) / (moments[-1] - moments[0]) <= 1.0


def between_sweeps(server: PostgresServer, since: float) -> list[float]:
    """When statements began, from a look to the last of those that follow it; empty until there are enough."""
    log = "".join(path.read_text(errors="replace") for path in server.directory.glob("*.log"))
    logged = [
        (float(line.split(" ", 1)[0]), line)
        for line in re.split(r"^@(?=[\d.]+ )", log, flags=re.MULTILINE)[1:]
        if re.match(r"[\d.]+ LOG:  (?:statement|execute \S+): ", line)
    ]
    quiet: list[tuple[float, bool]] = []
    for at, line in logged:
        if at < since or SWEEP in line:
            quiet.clear()
        elif LOOK in line or quiet:
            quiet.append((at, LOOK in line))
        if sum(look for _, look in quiet) > ROUNDS:
            return [at for at, _ in quiet]
    return []
