"""Celery workers on the Postgres broker: every pool, every way to die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Celery

from pgqrs_celery.db import Database
from tests.broker.workers import Bench, application
from tests.support.waiting import PATIENCE, wait_for

TASKS = "tests.broker.application."


def count(database: Database, where: str = "true") -> int:
    """How many messages there are."""
    text = f'SELECT count(*) FROM "{database.schema}".pgqrs_messages WHERE {where}'
    row = database.call(lambda session: session.connection.execute(text).fetchone())
    assert row
    return int(row[0])


def consumers(database: Database, where: str) -> int:
    """How many consumers there are."""
    text = f'SELECT count(*) FROM "{database.schema}".pgqrs_consumers WHERE {where}'
    row = database.call(lambda session: session.connection.execute(text).fetchone())
    assert row
    return int(row[0])


def wait_until_empty(database: Database, timeout: float = 10) -> None:
    wait_for(lambda: count(database) == 0, timeout, "all messages to be acknowledged")


Leasing = Callable[[float], Celery]


@pytest.fixture
def leasing(broker_url: str) -> Iterator[Leasing]:
    """Make apps that send with a lease: the first one of a message that is handed over is its sender's."""
    made: list[Celery] = []

    def make(lease: float) -> Celery:
        made.append(application(broker_url, lease=lease))
        return made[-1]

    yield make
    for app in made:
        app.close()


def send(client: Celery, task: str, *args: Any, **options: Any) -> Any:
    return client.send_task(TASKS + task, args, **options)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_every_pool_works_off_a_queue(pool: str, bench: Bench, client: Celery, database: Database) -> None:
    bench.worker("-P", pool, "-c", "2" if pool != "solo" else "1")
    for n in range(50):
        send(client, "record", n)
    send(client, "record", "later", countdown=1)
    send(client, "publish", ["nested"])
    entries = bench.wait_for_entries(52, "record")
    assert sorted(str(e["value"]) for e in entries) == sorted([*map(str, range(50)), "later", "nested"])
    wait_until_empty(database)
    assert client.control.ping(timeout=3, limit=1) == [{bench.workers[0].name: {"ok": "pong"}}]
    assert bench.workers[0].end() == 0


def send_records(bench: Bench, client: Celery, count: int, *, one_by_one: bool) -> None:
    """Send tasks, and wait until they are done, for each before the next or for all together."""
    base = len(bench.entries("record"))
    for n in range(base, base + count):
        send(client, "record", n)
        if one_by_one:
            bench.wait_for_entries(1, "record", n)
    bench.wait_for_entries(base + count, "record")


def test_no_task_waits_for_a_look(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "2", pushed_only=True)
    send_records(bench, client, 50, one_by_one=True)
    for n in range(5):
        send(client, "linger", n, 1)
        bench.wait_for_entries(1, "linger", n)
        send_records(bench, client, 60, one_by_one=False)
        bench.wait_for_entries(1, "lingered", n)


def test_a_warm_shutdown_finishes_what_runs_and_gives_back_the_rest_at_once(
    bench: Bench, client: Celery, database: Database
) -> None:
    first = bench.worker("-c", "1")
    for n in range(4):
        send(client, "hold", n, str(bench.gate))
    bench.wait_for_entries(1, "hold")
    wait_for(lambda: count(database, "leased_by IS NOT NULL") == 4, what="all to be prefetched")
    first.send_signal(signal.SIGTERM)
    wait_for(lambda: consumers(database, "'celery' = ANY(queues)") == 0, what="the worker to want nothing more")
    bench.gate.touch()
    assert first.process.wait(30) == 0
    assert len(bench.entries("held")) == 1
    assert count(database) == 3
    assert count(database, "leased_by IS NOT NULL") == 0
    bench.worker("-c", "3")
    bench.wait_for_entries(4, "held")
    wait_until_empty(database)
    assert len(bench.entries("hold")) == 4


def test_a_cold_shutdown_gives_back_what_ran(bench: Bench, client: Celery, database: Database) -> None:
    first = bench.worker("-c", "1")
    send(client, "linger", "x", 30)
    bench.wait_for_entries(1, "linger")
    # Celery ends what its main process knows to have begun; it hears of that after it has.
    inspect = client.control.inspect([first.name], timeout=PATIENCE, limit=1)
    wait_for(lambda: inspect.active()[first.name], PATIENCE, "the worker to know that the task has begun")
    first.end(signal.SIGQUIT)
    assert count(database, "leased_by IS NULL") == 1


def lease_end(database: Database, entry: dict[str, Any]) -> float:
    """When the lease of the message ends that an entry was written for."""
    text = f"SELECT leased_until FROM \"{database.schema}\".pgqrs_messages WHERE message_id = '{entry['tag']}'"
    (row,) = database.call(lambda session: session.connection.execute(text).fetchall())
    return float(row[0].timestamp())


def waits_for_lock(database: Database, pid: int) -> bool:
    text = f"SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = {pid}"
    return database.call(lambda session: session.connection.execute(text).fetchone()) is not None


def test_a_killed_worker_s_messages_come_back_when_its_lease_ends_at_the_latest(
    bench: Bench, leasing: Leasing, database: Database
) -> None:
    first = bench.worker("-c", "1", options={"lease": 2})
    send(leasing(2), "hold", "x", str(bench.gate))
    (entry,) = bench.wait_for_entries(1, "hold")
    with closing(database.connect()) as heir:
        # Who inherits the victim's lock hides its death: only its lease tells of that.
        inherit = f'SELECT pg_advisory_lock(lock_key) FROM "{database.schema}".pgqrs_consumers'
        heir.pgconn.send_query(inherit.encode())
        wait_for(lambda: waits_for_lock(database, heir.info.backend_pid), what="the heir to wait")
        first.kill()
        end = lease_end(database, entry)
        bench.worker("-c", "1", options={"lease": 2})
        again = bench.wait_for_entries(2, "hold")[1]
        assert consumers(database, "dead_at IS NOT NULL") == 0
    assert again["redelivered"]
    assert again["at"] >= end


def test_a_killed_worker_is_noticed_long_before_its_lease_ends(
    bench: Bench, leasing: Leasing, database: Database
) -> None:
    client, options, conf = leasing(600), {"lease": 600}, {"worker_prefetch_multiplier": 1}
    neighbour = bench.worker("-c", "1", options=options, conf=conf)
    send(client, "hold", "busy", str(bench.gate))
    bench.wait_for_entries(1, "hold", "busy")
    victim = bench.worker("-c", "1", options=options, conf=conf)
    send(client, "hold", "x", str(bench.gate))
    (entry,) = bench.wait_for_entries(1, "hold", "x")
    (answer,) = client.control.pool_grow(1, destination=[neighbour.name], reply=True, timeout=20)
    assert "ok" in answer[neighbour.name]
    victim.kill()
    end = lease_end(database, entry)
    again = bench.wait_for_entries(2, "hold", "x")[1]
    assert again["redelivered"]
    assert again["at"] < end - 300


def test_one_worker_that_is_killed_and_started_again_gets_its_message_back(bench: Bench, client: Celery) -> None:
    options = {"lease": 600}
    worker = bench.worker("-c", "1", options=options)
    send(client, "linger", "x", 30)
    bench.wait_for_entries(1, "linger")
    worker.kill()
    bench.worker("-c", "1", options=options)
    first, second = bench.wait_for_entries(2, "linger", timeout=15)
    assert (first["redelivered"], second["redelivered"]) == (False, True)


def test_a_killed_pool_process_s_message_comes_back_at_once(bench: Bench, leasing: Leasing, database: Database) -> None:
    # Long before its lease ends: billiard looks after its children every five seconds.
    bench.worker("-c", "2", options={"lease": 600})
    send(leasing(600), "kill_child", "x")
    first, second = bench.wait_for_entries(2, "kill_child")
    assert (first["redelivered"], second["redelivered"]) == (False, True)
    wait_until_empty(database)


def test_a_message_that_kills_its_workers_goes_to_the_dead_letter_queue(
    bench: Bench, client: Celery, database: Database
) -> None:
    options = {"lease": 1, "delivery_limit": 2}
    send(client, "kill_worker", "x")
    for deaths in (1, 2):
        worker = bench.worker("-c", "1", options=options)
        bench.wait_for_entries(deaths, "kill_worker")
        worker.process.wait(10)
        worker.kill()
    last = bench.worker("-c", "1", options=options)
    wait_for(lambda: count(database, "queue = 'pgqrs.dead'") == 1, 10, "the message to be buried")
    send(client, "record", "alive")
    bench.wait_for_entries(1, "record")
    assert last.process.poll() is None
    assert len(bench.entries("kill_worker")) == 2


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_task_longer_than_its_lease_runs_once(pool: str, bench: Bench, leasing: Leasing, database: Database) -> None:
    for _ in range(2):
        bench.worker("-P", pool, "-c", "1", options={"lease": 5})
    send(leasing(5), "hold", "x", str(bench.gate))
    (entry,) = bench.wait_for_entries(1, "hold")
    first_end = lease_end(database, entry)
    wait_for(lambda: lease_end(database, entry) > first_end + 5, 30, "the lease to be prolonged by its whole length")
    bench.gate.touch()
    bench.wait_for_entries(1, "held")
    wait_until_empty(database)
    assert len(bench.entries("hold")) == 1


def test_a_worker_that_executes_in_its_main_process_is_handed_nothing_meanwhile(bench: Bench, client: Celery) -> None:
    bench.worker("-P", "solo")
    send(client, "hold", "x", str(bench.gate))
    bench.wait_for_entries(1, "hold")
    bench.worker("-P", "solo")
    for n in range(6):
        send(client, "record", n)
        bench.wait_for_entries(1, "record", n)
    assert bench.entries("held") == []


def test_a_waiting_message_goes_to_the_worker_with_a_free_slot(bench: Bench, client: Celery) -> None:
    conf = {"worker_prefetch_multiplier": 1}
    for _ in range(2):
        bench.worker("-c", "1", conf=conf)
    for n in range(2):
        send(client, "hold", n, str(bench.gate))
    first, second = bench.wait_for_entries(2, "hold")
    assert first["parent"] != second["parent"]


def test_long_tasks_leave_no_slot_empty(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "3", conf={"worker_prefetch_multiplier": 1})
    send(client, "linger", 0, 0.1)
    for n in range(2):
        send(client, "hold", n, str(bench.gate))
    bench.wait_for_entries(2, "hold")
    bench.wait_for_entries(1, "linger")
    send(client, "record", "fourth")
    bench.wait_for_entries(1, "record")
    assert bench.entries("held") == []


def test_what_a_task_publishes_wakes_another_worker(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "1", "-Q", "a")
    bench.worker("-c", "1", "-Q", "celery", pushed_only=True)
    sent = send(client, "publish", list(range(5)), queue="a")
    entries = bench.wait_for_entries(5, "record")
    began = bench.wait_for_entries(1, "publish")[0]
    assert sent.id == began["id"]
    assert {e["parent"] for e in entries} == {bench.workers[1].process.pid}


def test_a_worker_consumes_from_several_queues_in_turn(bench: Bench, client: Celery) -> None:
    for n in range(300):
        send(client, "record", n, queue="a")
    for n in range(3):
        send(client, "record", f"b{n}", queue="b")
    bench.worker("-c", "1", "-Q", "a,b", conf={"worker_prefetch_multiplier": 1})
    bench.wait_for_entries(303, "record", timeout=40)
    order = [e["queue"] for e in bench.entries("record")]
    assert order.index("b") < 10


def test_the_message_s_id_is_known_in_the_pool_process(bench: Bench, client: Celery, database: Database) -> None:
    bench.worker("-c", "1")
    send(client, "hold", "x", str(bench.gate))
    entry = bench.wait_for_entries(1, "hold")[0]
    assert count(database, f"message_id = '{entry['tag']}'") == 1


def test_dead_processes_are_not_left_behind(bench: Bench) -> None:
    worker = bench.worker("-c", "2")
    pid = worker.process.pid
    assert worker.end() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_message_that_is_handed_over_stays_with_a_worker_whose_leases_are_longer(
    bench: Bench, leasing: Leasing, database: Database
) -> None:
    for _ in range(2):
        bench.worker("-c", "1", options={"lease": 60})
    # It is handed over only to one who sleeps.
    wait_for(lambda: consumers(database, "asleep") == 2, what="the workers to have nothing to do")
    send(leasing(10), "hold", "x", str(bench.gate))
    (entry,) = bench.wait_for_entries(1, "hold")
    wait_for(lambda: lease_end(database, entry) > entry["at"] + 30, 30, "the lease to be the worker's")
    assert count(database, "deliveries = 1") == 1
