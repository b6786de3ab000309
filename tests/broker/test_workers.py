"""Celery workers on the Postgres broker: every pool, every way to die."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from celery import Celery

from pgqrs_celery.db import Database
from tests.broker.workers import Bench
from tests.support.waiting import wait_for

TASKS = "tests.broker.application."


def count(database: Database, where: str = "true") -> int:
    """How many messages there are."""
    text = f'SELECT count(*) FROM "{database.schema}".pgqrs_messages WHERE {where}'
    row = database.call(lambda session: session.connection.execute(text).fetchone())
    assert row
    return int(row[0])


def wait_until_empty(database: Database, timeout: float = 10) -> None:
    wait_for(lambda: count(database) == 0, timeout, "all messages to be acknowledged")


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


def delays(bench: Bench, client: Celery, count: int, *, one_by_one: bool) -> list[float]:
    """Send tasks and return how long each took to be begun, shortest first."""
    base, sent = len(bench.entries("record")), {}
    for n in range(base, base + count):
        sent[n] = time.time()
        send(client, "record", n)
        if one_by_one:
            bench.wait_for_entries(1, "record", n)
    entries = bench.wait_for_entries(base + count, "record")
    return sorted(e["at"] - sent[e["value"]] for e in entries if e["value"] in sent)


def test_a_task_is_delivered_at_once(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "2")
    delays(bench, client, 1, one_by_one=True)
    # Only a look every 1.25 s would find what a lost notification was about.
    assert delays(bench, client, 50, one_by_one=True)[-1] < 0.6
    for n in range(5):
        send(client, "linger", n, 1)
        bench.wait_for_entries(1, "linger", n)
        assert delays(bench, client, 60, one_by_one=False)[-1] < 0.6
        bench.wait_for_entries(1, "lingered", n)


def test_a_warm_shutdown_finishes_what_runs_and_gives_back_the_rest_at_once(
    bench: Bench, client: Celery, database: Database
) -> None:
    first = bench.worker("-c", "1")
    for n in range(4):
        send(client, "linger", n, 1.5)
    bench.wait_for_entries(1, "linger")
    wait_for(lambda: count(database, "leased_by IS NOT NULL") == 4, 5, "all to be prefetched")
    assert first.end() == 0
    assert len(bench.entries("lingered")) == 1
    assert count(database) == 3
    assert count(database, "leased_by IS NOT NULL") == 0
    bench.worker("-c", "3")
    bench.wait_for_entries(4, "lingered", timeout=15)
    wait_until_empty(database)
    assert len(bench.entries("linger")) == 4


def test_a_cold_shutdown_gives_back_what_ran(bench: Bench, client: Celery, database: Database) -> None:
    first = bench.worker("-c", "1")
    send(client, "linger", "x", 30)
    bench.wait_for_entries(1, "linger")
    first.end(signal.SIGQUIT)
    assert count(database, "leased_by IS NULL") == 1


def test_a_killed_worker_s_messages_come_back_within_its_lease(
    bench: Bench, client: Celery, database: Database
) -> None:
    first = bench.worker("-c", "1", options={"lease": 2})
    send(client, "linger", "x", 60)
    bench.wait_for_entries(1, "linger")
    first.kill()
    bench.worker("-c", "1", options={"lease": 2})
    again = bench.wait_for_entries(2, "linger", timeout=10)[1]
    assert again["redelivered"]
    assert again["at"] - bench.entries("linger")[0]["at"] < 10


def test_a_killed_worker_is_noticed_long_before_its_lease_ends(
    bench: Bench, client: Celery, database: Database
) -> None:
    # A neighbour may judge once its own session is older than a lease; the victim's lease is much longer.
    bench.worker("-c", "1", "-Q", "celery", options={"lease": 1}, conf={"worker_prefetch_multiplier": 1})
    send(client, "linger", "busy", 60)
    bench.wait_for_entries(1, "linger", "busy")
    victim = bench.worker("-c", "1", options={"lease": 600}, conf={"worker_prefetch_multiplier": 1})
    send(client, "linger", "x", 60)
    bench.wait_for_entries(1, "linger", "x")
    client.control.pool_grow(1, destination=[bench.workers[0].name])
    killed = time.time()
    victim.kill()
    again = bench.wait_for_entries(2, "linger", "x", timeout=10)[1]
    assert again["redelivered"]
    assert again["at"] - killed < 5


def test_one_worker_that_is_killed_and_started_again_gets_its_message_back(bench: Bench, client: Celery) -> None:
    options = {"lease": 600}
    worker = bench.worker("-c", "1", options=options)
    send(client, "linger", "x", 30)
    bench.wait_for_entries(1, "linger")
    worker.kill()
    bench.worker("-c", "1", options=options)
    first, second = bench.wait_for_entries(2, "linger", timeout=15)
    assert (first["redelivered"], second["redelivered"]) == (False, True)


def test_a_killed_pool_process_s_message_comes_back_at_once(bench: Bench, client: Celery, database: Database) -> None:
    bench.worker("-c", "2")
    send(client, "kill_child", "x")
    first, second = bench.wait_for_entries(2, "kill_child")
    assert (first["redelivered"], second["redelivered"]) == (False, True)
    assert second["at"] - first["at"] < 8  # billiard looks after its children every five seconds
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


def test_a_task_longer_than_its_lease_runs_once(bench: Bench, client: Celery, database: Database) -> None:
    for _ in range(2):
        bench.worker("-c", "1", options={"lease": 1})
    send(client, "linger", "x", 4)
    bench.wait_for_entries(1, "lingered")
    wait_until_empty(database)
    assert len(bench.entries("linger")) == 1


def test_the_solo_pool_keeps_its_lease_while_it_works(bench: Bench, client: Celery, database: Database) -> None:
    for _ in range(2):
        bench.worker("-P", "solo", options={"lease": 1})
    send(client, "linger", "x", 4)
    bench.wait_for_entries(1, "lingered")
    wait_until_empty(database)
    assert len(bench.entries("linger")) == 1


def test_a_worker_that_executes_in_its_main_process_is_handed_nothing_meanwhile(bench: Bench, client: Celery) -> None:
    bench.worker("-P", "solo")
    send(client, "linger", "x", 8)
    bench.wait_for_entries(1, "linger")
    bench.worker("-P", "solo")
    for n in range(6):
        send(client, "record", n)
        bench.wait_for_entries(1, "record", n, timeout=3)
    assert bench.entries("lingered") == []


def test_a_waiting_message_goes_to_the_worker_with_a_free_slot(bench: Bench, client: Celery) -> None:
    conf = {"worker_prefetch_multiplier": 1}
    for _ in range(2):
        bench.worker("-c", "1", conf=conf)
    for n in range(2):
        send(client, "linger", n, 3)
    first, second = bench.wait_for_entries(2, "linger", timeout=2.5)
    assert first["parent"] != second["parent"]


def test_long_tasks_leave_no_slot_empty(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "3", conf={"worker_prefetch_multiplier": 1})
    for n in range(3):
        send(client, "linger", n, 5 if n else 0.1)
    bench.wait_for_entries(3, "linger")
    send(client, "record", "fourth")
    bench.wait_for_entries(1, "record", timeout=3)
    assert len(bench.entries("lingered")) == 1


def test_what_a_task_publishes_wakes_another_worker(bench: Bench, client: Celery) -> None:
    bench.worker("-c", "1", "-Q", "a")
    bench.worker("-c", "1", "-Q", "celery")
    sent = send(client, "publish", list(range(5)), queue="a")
    entries = bench.wait_for_entries(5, "record")
    began = bench.wait_for_entries(1, "publish")[0]
    assert sent.id == began["id"]
    assert entries[-1]["at"] - began["at"] < 0.8
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
    send(client, "linger", "x", 1.5)
    entry = bench.wait_for_entries(1, "linger")[0]
    assert count(database, f"message_id = '{entry['tag']}'") == 1


def test_dead_processes_are_not_left_behind(bench: Bench) -> None:
    worker = bench.worker("-c", "2")
    pid = worker.process.pid
    assert worker.end() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)
