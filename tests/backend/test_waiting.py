"""Waiting: pushed, raced, interrupted, shared by threads, greenlets and forked processes.

The looks that happen without a notification are switched off wherever a test is about a notification: what was not
pushed then never comes.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ChordError
from celery.exceptions import TimeoutError as CeleryTimeout

from pgqrs_celery import db, embedded, waiting
from pgqrs_celery.backend import PostgresBackend
from pgqrs_celery.db import Database
from pgqrs_celery.store import migrations
from tests.backend.application import make_app
from tests.backend.conftest import Spy, close
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
NEVER = 10_000.0


@pytest.fixture
def pushed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up but what a notification announced (and what is there when a wait begins)."""
    monkeypatch.setattr(waiting, "RECHECK", NEVER)
    monkeypatch.setattr(waiting, "RECHECK_DEAF", NEVER)


@pytest.fixture
def store(new_app: Callable[..., Celery]) -> Callable[..., Any]:
    """Store a result as another process would: through connections of its own."""
    writer: PostgresBackend = new_app().backend

    def store(task_id: str, value: Any, state: str = "SUCCESS") -> Any:
        return writer.store_result(task_id, value, state)

    return store


def waiters(spy: Spy, task_id: str = "t") -> int:
    return int(spy.value("SELECT count(*) FROM {}.pgqrs_waiters WHERE task_id = %s", task_id))


def in_thread(work: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(work)


def registered(spy: Spy, task_id: str = "t", count: int = 1) -> None:
    """Wait until somebody has registered as waiting."""
    wait_for(lambda: waiters(spy, task_id) >= count, what=f"{count} waiters for {task_id}")


@pytest.mark.usefixtures("pushed_only")
def test_a_result_is_pushed_to_who_waits_for_it(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20))
    registered(spy)
    store("t", 7)
    assert getting.result(timeout=10) == 7
    assert waiters(spy) == 0


@pytest.mark.usefixtures("pushed_only")
def test_states_on_the_way_reach_the_callback(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    seen: list[str] = []
    arrived = threading.Semaphore(0)

    def on_message(meta: dict[str, Any]) -> None:
        seen.append(meta["status"])
        arrived.release()

    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20, on_message=on_message))
    registered(spy)
    for state in ("STARTED", "PROGRESS", "SUCCESS"):
        store("t", 1, state)
        assert arrived.acquire(timeout=10)
    assert getting.result(timeout=10) == 1
    assert seen == ["STARTED", "PROGRESS", "SUCCESS"]


@pytest.mark.usefixtures("pushed_only")
def test_what_is_raised_is_the_error_of_the_parent_if_that_is_what_has_failed(
    app: Celery, store: Callable[..., Any], spy: Spy
) -> None:
    waited_for = app.AsyncResult("t", parent=app.AsyncResult("parent"))
    getting = in_thread(lambda: waited_for.get(timeout=20))
    registered(spy)
    store("parent", ValueError("the cause"), "FAILURE")
    store("t", ChordError("Dependency parent raised ValueError"), "FAILURE")
    with pytest.raises(ValueError, match="the cause"):
        getting.result(timeout=10)


@pytest.mark.usefixtures("pushed_only")
def test_several_threads_wait_for_different_and_for_the_same_results(
    app: Celery, store: Callable[..., Any], spy: Spy
) -> None:
    with ThreadPoolExecutor(12) as pool:
        futures = {
            (n, k): pool.submit(lambda n=n: app.AsyncResult(f"t{n}").get(timeout=20)) for n in range(6) for k in "ab"
        }
        for n in range(6):
            registered(spy, f"t{n}")
        assert len(spy.listeners()) == 1
        for n in random.sample(range(6), 6):
            store(f"t{n}", n)
        for (n, _), future in futures.items():
            assert future.result(timeout=10) == n


@pytest.mark.usefixtures("pushed_only")
def test_two_processes_may_wait_for_one_result(
    new_app: Callable[..., Celery], store: Callable[..., Any], spy: Spy
) -> None:
    apps = [new_app() for _ in range(3)]
    getting = [in_thread(lambda app=app: app.AsyncResult("t").get(timeout=20)) for app in apps]
    registered(spy, count=3)
    assert len(spy.listeners()) == 3
    store("t", 1)
    assert [future.result(timeout=10) for future in getting] == [1, 1, 1]


@pytest.mark.usefixtures("pushed_only")
def test_no_wake_up_is_lost_however_the_store_and_the_wait_interleave(app: Celery, store: Callable[..., Any]) -> None:
    """Fails within its time limit if one of 400 races is lost: nothing else would wake that waiter."""
    app.AsyncResult("warm").backend.store_result("warm", 1, "SUCCESS")
    chance = random.Random(1)
    with ThreadPoolExecutor(2) as pool:
        for n in range(400):
            head_start = chance.uniform(-0.002, 0.003)
            storing = pool.submit(lambda n=n, s=head_start: (time.sleep(max(0, s)), store(f"t{n}", n)))
            time.sleep(max(0, -head_start))
            assert app.AsyncResult(f"t{n}").get(timeout=15) == n
            storing.result()


@pytest.mark.usefixtures("pushed_only")
def test_groups_and_nested_groups_are_joined(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    def group(name: str) -> Any:
        return app.GroupResult(name, [app.AsyncResult(f"{name}{n}") for n in range(5)])

    outer = app.GroupResult("outer", [group("a"), app.AsyncResult("single"), group("b")])
    getting = in_thread(lambda: outer.get(timeout=20))
    wait_for(lambda: spy.value("SELECT count(*) FROM {}.pgqrs_waiters") > 0)
    for task_id in ("b0", "a4", "single", "a0", "a1", "b4", "b1", "a2", "b2", "b3", "a3"):
        store(task_id, task_id)
    assert getting.result(timeout=10) == [[f"a{n}" for n in range(5)], "single", [f"b{n}" for n in range(5)]]


def test_only_a_wait_opens_a_listening_connection(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    result = app.AsyncResult("t")
    result.then(lambda r: None)
    app.GroupResult("g", [app.AsyncResult(f"t{n}") for n in range(3)])
    app.tasks["add"].delay(1, 2)
    assert result.state == "PENDING"
    store("there", 1)
    assert app.AsyncResult("there").get(timeout=5) == 1
    assert spy.listeners() == []
    assert waiters(spy, "there") == 0
    with pytest.raises(CeleryTimeout):
        result.get(timeout=0.05)
    assert len(spy.listeners()) == 1


@pytest.mark.parametrize("timeout", [0, 0.05, 0.3, 1.2])
def test_a_wait_ends_when_its_time_is_over(app: Celery, timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    in_vain: list[float] = []

    def readable(socket: int, seconds: float) -> bool:
        found = db.readable(socket, seconds)
        if not found:
            in_vain.append(seconds)
        return found

    monkeypatch.setattr("pgqrs_celery.listener.readable", readable)
    started = time.monotonic()
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("t").get(timeout=timeout)
    assert timeout <= time.monotonic() - started
    # However long the machine took over it: not a slice of waiting was begun that would have ended later.
    assert sum(in_vain) <= timeout + 0.01


def test_an_abandoned_wait_takes_its_registration_back(app: Celery, spy: Spy) -> None:
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("t").get(timeout=0.2)
    assert waiters(spy) == 1
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("u").get(timeout=0.2)
    assert waiters(spy, "t") == 0


def test_what_dead_waiters_left_is_removed(backend: PostgresBackend, spy: Spy) -> None:
    spy.rows("INSERT INTO {}.pgqrs_waiters VALUES ('t', 'pgqrs_x', now() - interval '11 min') RETURNING 1")
    spy.rows("INSERT INTO {}.pgqrs_waiters VALUES ('u', 'pgqrs_x', now() - interval '9 min') RETURNING 1")
    backend.cleanup()
    assert spy.rows("SELECT task_id FROM {}.pgqrs_waiters") == [("u",)]


@pytest.mark.usefixtures("pushed_only")
def test_nobody_is_notified_of_a_result_nobody_waits_for(store: Callable[..., Any], app: Celery, spy: Spy) -> None:
    spy.connection.execute('LISTEN "pgqrs_other"')
    spy.rows("INSERT INTO {}.pgqrs_waiters VALUES ('awaited', 'pgqrs_other') RETURNING 1")
    store("unawaited", 1)
    store("awaited", 1)
    (notification,) = spy.connection.notifies(timeout=5, stop_after=1)
    assert notification.payload.startswith("awaited")


@pytest.mark.usefixtures("pushed_only")
@pytest.mark.parametrize("size", [10, 7_600, 7_999, 100_000])
@pytest.mark.parametrize("task_id", ["t", "a\x1fb", "ü" * 700], ids=["short", "separator", "long"])
def test_a_result_of_any_size_and_id_is_pushed(
    app: Celery, store: Callable[..., Any], spy: Spy, size: int, task_id: str
) -> None:
    """Small ones travel in the notification, large ones are fetched."""
    getting = in_thread(lambda: app.AsyncResult(task_id).get(timeout=20))
    registered(spy, task_id)
    store(task_id, "x" * size)
    assert getting.result(timeout=10) == "x" * size


@pytest.mark.usefixtures("pushed_only")
def test_a_result_that_is_not_json_is_pushed(new_app: Callable[..., Celery], spy: Spy) -> None:
    app = new_app(result_serializer="pickle", result_accept_content=["pickle"])
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20))
    registered(spy)
    new_app(result_serializer="pickle").backend.store_result("t", {1, 2}, "SUCCESS")
    assert getting.result(timeout=10) == {1, 2}


@pytest.mark.usefixtures("pushed_only")
def test_a_registration_in_vain_is_taken_back(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("warm").get(timeout=0.1)
    store("there", 1)
    assert app.AsyncResult("there").get(timeout=5) == 1
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("warm").get(timeout=0.1)
    assert waiters(spy, "there") == 0


@pytest.mark.usefixtures("pushed_only")
def test_a_lost_connection_is_replaced_and_what_was_missed_is_read(
    app: Celery, store: Callable[..., Any], spy: Spy
) -> None:
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20))
    registered(spy)
    (listener,) = spy.listeners()
    # Without its registration the waiter can only learn of the result by listening and looking again.
    spy.rows("DELETE FROM {}.pgqrs_waiters RETURNING 1")
    store("t", 7)
    assert not getting.done()
    spy.rows("SELECT pg_terminate_backend(%s)", listener)
    assert getting.result(timeout=10) == 7


def test_a_wait_outlives_a_restart_of_postgres(own_postgres: embedded.PostgresServer) -> None:
    dsn = own_postgres.dsn()
    migrations.install(Database(dsn))
    app, writer = (make_app("memory://", f"pgqrs+{dsn}") for _ in range(2))
    getting = [in_thread(lambda n=n: app.AsyncResult(f"t{n}").get(timeout=60)) for n in range(3)]
    spy = Spy(dsn, "public")
    for n in range(3):
        registered(spy, f"t{n}")
    writer.backend.store_result("t0", 0, "SUCCESS")
    assert getting[0].result(timeout=10) == 0
    own_postgres.restart(immediate=True)
    assert not getting[1].done()
    writer.backend.store_result("t1", 1, "SUCCESS")
    assert getting[1].result(timeout=20) == 1
    # The third one's registration was in an unlogged table, empty after a crash: it has registered again.
    registered(Spy(dsn, "public"), "t2")
    writer.backend.store_result("t2", 2, "SUCCESS")
    assert getting[2].result(timeout=20) == 2
    for each in (app, writer):
        close(each)


def test_while_the_database_is_away_only_the_wait_s_own_time_ends_it(own_postgres: embedded.PostgresServer) -> None:
    dsn = own_postgres.dsn()
    migrations.install(Database(dsn))
    app = make_app("memory://", f"pgqrs+{dsn}")
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=3))
    registered(Spy(dsn, "public"))
    started = time.monotonic()
    own_postgres.stop()
    with pytest.raises(CeleryTimeout):
        getting.result(timeout=20)
    assert time.monotonic() - started < 8
    close(app)


def test_where_notifications_cannot_arrive_results_are_looked_up_and_the_log_says_why(
    new_app: Callable[..., Celery],
    store: Callable[..., Any],
    own_database_dsn: str,
    spy: Spy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A listener in another database hears as little as one behind a transaction pooler."""
    monkeypatch.setattr("pgqrs_celery.listener.PROOF", 0.3)
    app = new_app(pgqrs_direct_dsn=own_database_dsn)
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20))
    wait_for(lambda: "pgqrs_direct_dsn" in caplog.text, what="the warning")
    store("t", 7)
    assert getting.result(timeout=5) == 7


@pytest.mark.usefixtures("pushed_only")
def test_a_forked_child_waits_on_its_own_and_leaves_the_parent_alone(
    app: Celery, store: Callable[..., Any], spy: Spy
) -> None:
    with pytest.raises(CeleryTimeout):
        app.AsyncResult("warm").get(timeout=0.1)
    (mine,) = spy.listeners()
    inherited = app.AsyncResult("t")
    child = os.fork()
    if child == 0:
        try:
            os._exit(inherited.get(timeout=20))
        finally:
            os._exit(99)
    registered(spy)
    assert len(spy.listeners()) == 2
    store("t", 42)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert mine in spy.listeners()
    getting = in_thread(lambda: app.AsyncResult("u").get(timeout=20))
    registered(spy, "u")
    store("u", 1)
    assert getting.result(timeout=10) == 1


@pytest.mark.usefixtures("pushed_only")
def test_a_child_forked_while_a_thread_waits_is_not_blocked(app: Celery, store: Callable[..., Any], spy: Spy) -> None:
    getting = in_thread(lambda: app.AsyncResult("t").get(timeout=20))
    registered(spy)
    child = os.fork()
    if child == 0:
        try:
            os._exit(app.AsyncResult("u").get(timeout=20))
        finally:
            os._exit(99)
    registered(spy, "u")
    store("u", 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    store("t", 4)
    assert getting.result(timeout=10) == 4


GREENLETS = """
    import sys, time
    from {library} import {patch}
    {patch}()
    from tests.backend.application import make_app
    app = make_app("memory://", sys.argv[1])
    app.conf.worker_pool = "{library}"
    ticks, called = [], []
    {prelude}

    def tick():
        while True:
            ticks.append(time.monotonic())
            {sleep}(0.01)

    def get(n):
        return app.AsyncResult(f"t{{n}}").get(timeout=20)

    spawned(tick)
    app.AsyncResult("then").then(lambda result: called.append(result.result))
    waits = [spawned(get, n) for n in range(5)]
    print("waiting", flush=True)
    values = [value_of(w) for w in waits]
    for _ in range(300):
        if called:
            break
        {sleep}(0.01)
    gaps = max(b - a for a, b in zip(ticks, ticks[1:]))
    print(values, called, "smooth" if gaps < 1 else gaps, flush=True)
"""

PRELUDES = {
    "gevent": (
        "monkey.patch_all",
        "import gevent; spawned = gevent.spawn; value_of = lambda w: w.get()",
        "gevent.sleep",
    ),
    "eventlet": (
        "monkey_patch",
        "import eventlet; spawned = eventlet.spawn; value_of = lambda w: w.wait()",
        "eventlet.sleep",
    ),
}


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_wait_without_blocking_each_other(
    library: str, backend_url: str, store: Callable[..., Any], spy: Spy
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    patch, prelude, sleep = PRELUDES[library]
    module, _, function = patch.rpartition(".")
    script = textwrap.dedent(GREENLETS).format(library=library, patch=module or function, prelude=prelude, sleep=sleep)
    script = script.replace("monkey()", "monkey.patch_all()")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, backend_url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        for task_id in ("t0", "t4", "then"):
            registered(spy, task_id)
        for task_id, value in [("then", "yes"), *((f"t{n}", n) for n in range(5))]:
            store(task_id, value)
        assert process.stdout.readline() == "[0, 1, 2, 3, 4] ['yes'] smooth\n"
