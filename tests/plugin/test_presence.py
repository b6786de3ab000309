"""Workers that watch each other, in one process: each with its own session, as in a fleet."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from celery import Celery

from pgqrs_celery import Pgqrs, embedded
from pgqrs_celery.db import Database
from pgqrs_celery.incarnation import Incarnation
from pgqrs_celery.lookout import lookout
from pgqrs_celery.monitor import Monitor
from pgqrs_celery.presence import SECOND_LOOK, Presence
from pgqrs_celery.store import workers
from tests.support.waiting import wait_for

MakePresence = Callable[..., Presence]


@pytest.fixture
def make_presence(database_dsn: str, schema: str) -> Iterator[MakePresence]:
    """Make workers' presences, with a lease that no test sees the end of, unless it asks for another."""
    made: list[Presence] = []

    def make(name: str, dsn: str = database_dsn, **conf: Any) -> Presence:
        app = Celery("fleet", set_as_current=False)
        app.conf.update(pgqrs_dsn=dsn, pgqrs_schema=schema, pgqrs_lease=3600.0, pgqrs_auto_install=True, **conf)
        ledger: Any = Pgqrs(app).ledger
        ledger.prepare()
        ledger.incarnation = Incarnation()
        made.append(Presence(ledger, name))
        return made[-1]

    yield make
    for presence in made:
        presence.abandon()
        presence.ledger.database.close()


def missed(watching: Presence, dead: UUID | None) -> bool:
    """Whether a worker has declared another one dead by now."""
    watching.watch()
    return dead in {w.worker_id for w in Monitor(watching.ledger.database).workers(ended=True) if w.stopped_at}


def only_neighbour(presence: Presence) -> workers.Neighbour:
    """The one other worker, as this one sees it."""
    me = presence.ledger.worker_id
    assert me is not None
    (neighbour,) = presence.ledger.call(lambda session: workers.neighbours(session, me, app="fleet", limit=8))
    return neighbour


def test_a_worker_that_died_before_another_one_started_is_missed_before_its_lease_ends(
    make_presence: MakePresence,
) -> None:
    old, new = make_presence("old"), make_presence("new")
    old.open()
    dead = old.ledger.worker_id
    old.abandon()  # its session ends, as with the process
    new.open()
    wait_for(lambda: missed(new, dead), what="the death to be noticed")


@pytest.mark.parametrize("crash", [False, True])
def test_after_a_restart_of_postgres_a_free_lock_proves_nothing(
    own_postgres: embedded.PostgresServer, make_presence: MakePresence, crash: bool
) -> None:
    old = make_presence("old", own_postgres.dsn(), pgqrs_watch_interval=5.0)
    new = make_presence("new", own_postgres.dsn(), pgqrs_watch_interval=5.0)
    old.open()
    if crash:
        own_postgres.crash()
    else:
        own_postgres.restart()
    new.open()
    seen = only_neighbour(new)
    assert (seen.worker_id, seen.free, seen.certain) == (old.ledger.worker_id, True, False)
    assert new.watch() == 5.0
    old.open()
    seen = only_neighbour(new)
    assert (seen.worker_id, seen.free, seen.certain) == (old.ledger.worker_id, False, True)


def test_a_worker_that_lost_its_session_gives_the_others_time_to_come_back(
    make_presence: MakePresence, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, other = make_presence("cut", pgqrs_watch_interval=5.0), make_presence("other")
    other.open()
    cut.open()
    gone = other.ledger.worker_id
    other.abandon()
    wait_for(lambda: cut.watch() == SECOND_LOOK, what="the other one to be missed")
    cut.open()
    assert cut.watch() == 5.0
    monkeypatch.setattr("pgqrs_celery.presence.SETTLING", 0.0)
    cut.open()
    wait_for(lambda: missed(cut, gone), what="the death to be noticed")


def test_who_misses_a_worker_calls_the_broker_s_keepers_and_looks_again_soon(make_presence: MakePresence) -> None:
    old, new = make_presence("old"), make_presence("new")
    alarms: list[bool] = []
    listener = partial(alarms.append, True)
    lookout.listen(listener)
    try:
        new.open()
        old.open()
        assert old.watch() == old.ledger.settings.watch_interval
        assert lookout.watched() == ["fleet"]
        assert alarms == []
        new.abandon()
        assert wait_for(lambda: old.watch() == SECOND_LOOK and alarms, what="the worker to be missed")
    finally:
        lookout.leave(listener)
    old.abandon()
    assert lookout.watched() == []


#: Waits for a notification in one greenlet, which another one sends: in vain where the wait stops the whole process.
GREENLETS = """
import sys
if sys.argv[1] == "gevent":
    from gevent import monkey, spawn; monkey.patch_all()
else:
    import eventlet; eventlet.monkey_patch(); spawn = eventlet.spawn
import time
import psycopg
from pgqrs_celery.db import notifications
listening = psycopg.connect(sys.argv[2], autocommit=True)
listening.execute(f"LISTEN {sys.argv[3]}")

def send():
    with psycopg.connect(sys.argv[2], autocommit=True) as sending:
        sending.execute(f"NOTIFY {sys.argv[3]}, 'heard'")

spawn(send)
print(*notifications(listening, 60.0))
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_waiting_for_a_call_lets_other_greenlets_run(library: str, database_dsn: str, schema: str) -> None:
    pytest.importorskip(library)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GREENLETS, library, database_dsn, schema],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert answer.stdout == "heard\n"


def test_behind_a_transaction_pooler_nobody_is_judged_by_a_lock_that_is_the_poolers(
    make_presence: MakePresence, pgbouncer: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    pooled = make_presence("pooled", pgbouncer("transaction"), pgqrs_prepared_statements=False)
    direct = make_presence("direct", pgqrs_watch_interval=0.05)
    with caplog.at_level(logging.WARNING, "pgqrs_celery.presence"):
        pooled.open()
    assert "dead ones are noticed by their leases only" in caplog.text
    direct.open()
    with direct.ledger.database.session() as session:
        assert workers.neighbours(session, direct.ledger.worker_id, app="fleet", limit=8) == []
    assert pooled.watch() == pooled.ledger.settings.watch_interval
    listed = {worker.hostname: worker for worker in Monitor(direct.ledger.database).workers()}
    assert listed.keys() == {"pooled", "direct"}
    assert all(worker.stopped_at is None for worker in listed.values())


def test_a_worker_with_a_way_around_the_pooler_is_watched_as_ever(
    make_presence: MakePresence, pgbouncer: Callable[[str], str], database_dsn: str
) -> None:
    pooled = make_presence(
        "pooled", pgbouncer("transaction"), pgqrs_prepared_statements=False, pgqrs_direct_dsn=database_dsn
    )
    direct = make_presence("direct")
    pooled.open()
    direct.open()
    seen = only_neighbour(direct)
    assert seen.worker_id == pooled.ledger.worker_id
    assert not seen.free


@pytest.mark.parametrize(("mode", "ours"), [("transaction", False), ("session", False), (None, True)])
def test_a_pooler_s_sessions_keep_the_settings_they_had(
    pgbouncer: Callable[[str], str], database_dsn: str, mode: str | None, ours: bool
) -> None:
    database = Database(pgbouncer(mode) if mode else database_dsn, prepared_statements=False)
    with database.session() as session:
        assert session.connection.execute("SHOW enable_seqscan").fetchone() == ("off" if ours else "on",)
    database.close()
