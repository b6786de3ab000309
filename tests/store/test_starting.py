"""A new run with one step and one message: one transaction, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from pgqrs_celery.store import consumers, messages, migrations, units
from pgqrs_celery.store.messages import NewMessage, handed, new_id
from pgqrs_celery.store.runs import NewRun
from tests.conftest import POSTGRES_SETTINGS
from tests.support.ledger import INTERVAL, MESSAGE, Ledger
from tests.support.waiting import wait_for


def message() -> NewMessage:
    return NewMessage(new_id(), "", "celery", json.dumps({"id": "a"}), "{}", b"[]")


def start(ledger: Ledger, root_id: str = "a", *, wake: bool = False) -> int | None:
    run = NewRun(ledger.app, root_id, "pack", labels='{"colour": "red"}')
    return units.start(ledger.session, run, ledger.step("a"), message(), sent_header="sent", wake=wake)


def sleeping(ledger: Ledger) -> tuple[UUID, Session]:
    """Register a consumer that sleeps; returns it with the connection on which it is notified."""
    sleeper, listener = uuid4(), ledger.connect()
    consumers.register(listener, sleeper, hostname="w", pid=1, queues=["celery"], lease=30.0, locked=True, formers=[])
    assert not consumers.doze(listener, sleeper, ["celery"], 7)
    listener.connection.execute(f'LISTEN "pgqrs_{sleeper.hex}"'.encode())
    return sleeper, listener


def messages_of(ledger: Ledger) -> list[tuple[str, str]]:
    """Return queue and headers of every message."""
    return ledger.execute("SELECT queue, headers FROM {schema}.pgqrs_messages")  # type: ignore[return-value]


def test_run_step_and_message_are_entered_and_the_message_says_when(ledger: Ledger) -> None:
    now = ledger.stop_clock()
    workflow_id = start(ledger)
    assert workflow_id is not None
    assert ledger.run_status(workflow_id) == "QUEUED"
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.sent, row.message) == ("QUEUED", True, INTERVAL, True, MESSAGE)
    ((queue, headers),) = messages_of(ledger)
    assert queue == "celery"
    assert datetime.fromisoformat(json.loads(headers)["sent"]) == now
    assert ledger.execute("SELECT labels FROM {schema}.pgqrs_workflows") == [('{"colour": "red"}',)]


def test_a_run_that_exists_is_left_alone(ledger: Ledger) -> None:
    assert start(ledger) is not None
    assert start(ledger) is None
    assert len(messages_of(ledger)) == 1


def test_a_step_of_another_run_lets_nothing_be_entered(ledger: Ledger) -> None:
    ledger.start("a")
    with pytest.raises(psycopg.errors.UniqueViolation):
        start(ledger, "another root")
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflows") == [(1,)]
    assert messages_of(ledger) == []


def test_a_consumer_that_sleeps_is_handed_the_message(ledger: Ledger) -> None:
    sleeper, listener = sleeping(ledger)
    start(ledger, wake=True)
    (note,) = listener.connection.notifies(timeout=30, stop_after=1)
    came = handed(note.payload)
    assert came is not None
    headers = json.loads(came.claimed.headers)
    assert (came.nap, headers.keys(), headers["id"]) == (7, {"sent", "id"}, "a")
    assert ledger.execute("SELECT leased_by FROM {schema}.pgqrs_messages") == [(sleeper,)]


@pytest.fixture
def stuck(own_data: Path) -> Iterator[Callable[[bool], Ledger]]:
    """A ledger whose server's commits wait for a standby that is not there, as for a slow disk, or no longer."""
    server = embedded.postgres(own_data, settings={**POSTGRES_SETTINGS, "wal_level": "replica", "max_wal_senders": "1"})
    database = Database(server.start().dsn())
    migrations.install(database)
    ledger = Ledger(database)

    def stick(sticks: bool) -> Ledger:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{'nobody' if sticks else ''}'")
            connection.execute("SELECT pg_reload_conf()")
            standby = "SELECT current_setting('synchronous_standby_names')"
            wait_for(lambda: connection.execute(standby).fetchone() == ("nobody" if sticks else "",))
        return ledger

    yield stick
    stick(False)
    ledger.close()
    database.close()


def waits_for_disk(ledger: Ledger) -> bool:
    return ledger.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == [(1,)]


def test_a_sleeper_is_handed_a_message_while_it_is_written_and_its_sender_waits(
    stuck: Callable[[bool], Ledger],
) -> None:
    ledger = stuck(False)
    _, listener = sleeping(ledger)
    sender, watcher = ledger.connect(), ledger.connect()
    stuck(True)
    sent = ledger.in_thread(lambda: messages.post(sender, message(), wake=True))
    (note,) = listener.connection.notifies(timeout=30, stop_after=1)
    assert handed(note.payload) is not None
    wait_for(lambda: waits_for_disk(ledger), what="the sender to wait for the disk")
    assert not sent.done()
    assert watcher.connection.execute("SELECT count(*) FROM pgqrs_messages").fetchone() == (1,)
    stuck(False)
    sent.result(30)


@pytest.mark.parametrize("durable", [True, False])
def test_nobody_is_handed_what_is_to_be_on_disk_before(stuck: Callable[[bool], Ledger], durable: bool) -> None:
    """The first link of a run; a message for which nobody slept when it was sent."""
    ledger = stuck(False)
    sender = ledger.connect()
    _, listener = sleeping(ledger)
    if not durable:
        ledger.execute("UPDATE {schema}.pgqrs_consumers SET asleep = false")
    stuck(True)
    run = NewRun(ledger.app, "a", "pack")
    if durable:
        sent = ledger.in_thread(
            lambda: units.start(sender, run, ledger.step("a"), message(), sent_header="sent", wake=True)
        )
    else:
        sent = ledger.in_thread(lambda: messages.post(sender, message(), wake=True))
    wait_for(lambda: waits_for_disk(ledger), what="the sender to wait for the disk")
    assert messages_of(ledger) == [], "nobody sees it"
    assert not sent.done()
    stuck(False)
    sent.result(30)
    if durable:
        (note,) = listener.connection.notifies(timeout=30, stop_after=1)
        assert handed(note.payload) is not None


@pytest.mark.parametrize("how", ["alone", "with its transaction", "in a batch"])
def test_a_message_that_is_sent_again_is_not_accepted_before_it_is_on_disk(
    stuck: Callable[[bool], Ledger], how: str
) -> None:
    """The connection is lost while its first sender waits; by now the consumer may be awake, and has the message."""
    ledger = stuck(False)
    _, listener = sleeping(ledger)
    first, second, new = ledger.connect(), ledger.connect(), message()
    stuck(True)
    sent = ledger.in_thread(lambda: messages.post(first, new, wake=True))
    next(listener.connection.notifies(timeout=30, stop_after=1))
    wait_for(lambda: waits_for_disk(ledger), what="the sender to wait for the disk")

    def send_again() -> None:
        if how == "alone":
            messages.post(second, new, wake=True)
        else:
            second.run(*messages.insertion([new] if how == "with its transaction" else [new, new]))

    again = ledger.in_thread(send_again)
    pid = second.connection.info.backend_pid
    waiting = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
    wait_for(lambda: again.done() or ledger.execute(waiting, [pid]) == [("SyncRep",)], what="it to wait, too")
    assert not again.done()
    stuck(False)
    sent.result(30)
    again.result(30)
    assert len(messages_of(ledger)) == 1
