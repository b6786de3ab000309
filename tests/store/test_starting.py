"""A new run with one step and one message: one transaction, or nothing."""

from __future__ import annotations

import json
from datetime import datetime
from uuid import uuid4

import psycopg
import pytest

from pgqrs_celery.store import consumers, units
from pgqrs_celery.store.messages import NewMessage, handed, new_id
from pgqrs_celery.store.runs import NewRun
from tests.support.ledger import INTERVAL, MESSAGE, Ledger


def message() -> NewMessage:
    return NewMessage(new_id(), "", "celery", json.dumps({"id": "a"}), "{}", b"[]")


def start(ledger: Ledger, root_id: str = "a", *, wake: bool = False) -> int | None:
    run = NewRun(ledger.app, root_id, "pack", labels='{"colour": "red"}')
    return units.start(ledger.session, run, ledger.step("a"), message(), sent_header="sent", wake=wake)


def messages(ledger: Ledger) -> list[tuple[str, str]]:
    """Return queue and headers of every message."""
    return ledger.execute("SELECT queue, headers FROM {schema}.pgqrs_messages")  # type: ignore[return-value]


def test_run_step_and_message_are_entered_and_the_message_says_when(ledger: Ledger) -> None:
    now = ledger.stop_clock()
    workflow_id = start(ledger)
    assert workflow_id is not None
    assert ledger.run_status(workflow_id) == "QUEUED"
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.sent, row.message) == ("QUEUED", True, INTERVAL, True, MESSAGE)
    ((queue, headers),) = messages(ledger)
    assert queue == "celery"
    assert datetime.fromisoformat(json.loads(headers)["sent"]) == now
    assert ledger.execute("SELECT labels FROM {schema}.pgqrs_workflows") == [('{"colour": "red"}',)]


def test_a_run_that_exists_is_left_alone(ledger: Ledger) -> None:
    assert start(ledger) is not None
    assert start(ledger) is None
    assert len(messages(ledger)) == 1


def test_a_step_of_another_run_lets_nothing_be_entered(ledger: Ledger) -> None:
    ledger.start("a")
    with pytest.raises(psycopg.errors.UniqueViolation):
        start(ledger, "another root")
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflows") == [(1,)]
    assert messages(ledger) == []


def test_a_consumer_that_sleeps_is_handed_the_message(ledger: Ledger) -> None:
    sleeper, listener = uuid4(), ledger.connect()
    consumers.register(listener, sleeper, hostname="w", pid=1, queues=["celery"], lease=30.0, locked=True, formers=[])
    assert not consumers.doze(listener, sleeper, ["celery"], 7)
    listener.connection.execute(f'LISTEN "pgqrs_{sleeper.hex}"'.encode())
    start(ledger, wake=True)
    (note,) = listener.connection.notifies(timeout=30, stop_after=1)
    came = handed(note.payload)
    assert came is not None
    headers = json.loads(came.claimed.headers)
    assert (came.nap, headers.keys(), headers["id"]) == (7, {"sent", "id"}, "a")
    assert ledger.execute("SELECT leased_by FROM {schema}.pgqrs_messages") == [(sleeper,)]
