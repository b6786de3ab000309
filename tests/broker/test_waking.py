"""Waking: who publishes reaches a consumer that sleeps, however both are interrupted. Nobody looks by himself here."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import kombu
import pytest
from celery import Celery

from pgqrs_celery.db import Database
from pgqrs_celery.store.messages import Handed
from pgqrs_celery.transport import keeper
from pgqrs_celery.transport.bell import MOST_QUEUES, NEWS, Bell
from pgqrs_celery.transport.sleep import Sleep
from pgqrs_celery.transport.wire import readable
from tests.broker.test_prefetch import asleep
from tests.support.waiting import wait_for


@pytest.fixture
def ears(connect: Callable[..., kombu.Connection], monkeypatch: pytest.MonkeyPatch) -> Callable[[], kombu.Connection]:
    """Make connections whose consumers hear of what they are told, and look at nothing by themselves."""
    monkeypatch.setattr(keeper, "LOOK_INTERVAL", 3600.0)
    return lambda: connect(lease=3 * 3600.0)


@pytest.fixture
def bell() -> Iterator[Bell]:
    """A bell of the test's own."""
    bell = Bell()
    yield bell
    bell.close()


def test_a_process_that_consumes_many_queues_tells_others_of_what_it_publishes_to_theirs(
    ears: Callable[[], kombu.Connection], client: Celery, database: Database
) -> None:
    here, there = ears(), ears()
    got: list[Any] = []
    many = [kombu.Queue(f"here-{n}") for n in range(200)]
    with kombu.Consumer(here, many), kombu.Consumer(there, [kombu.Queue("there")], on_message=got.append):
        assert here.transport.broker.near("here-0") is not None, "this is the process's own bell"
        wait_for(lambda: asleep(database, there), what="the consumer to sleep")
        client.send_task("t", (1,), queue="there")
        there.drain_events(timeout=20)
    assert len(got) == 1


def test_a_bell_hears_what_its_owner_consumes_and_nothing_else(bell: Bell) -> None:
    assert not bell.hears("queue-0")
    bell.listen_for(f"queue-{n}" for n in range(MOST_QUEUES + 1))
    assert all(bell.hears(f"queue-{n}") for n in range(MOST_QUEUES))
    assert not bell.hears(f"queue-{MOST_QUEUES}"), "it is told by a NOTIFY"
    assert not any(bell.hears(f"other-{n}") for n in range(1000))
    bell.listen_for(["queue-1"])
    assert [n for n in range(MOST_QUEUES) if bell.hears(f"queue-{n}")] == [1]


def test_news_that_comes_while_the_bell_is_being_hushed_is_not_lost(bell: Bell) -> None:
    class Page:
        """The bell's memory; somebody rings between two looks at it."""

        def __init__(self, page: mmap.mmap) -> None:
            self.page = page
            self.read = False

        def __getitem__(self, at: int) -> int:
            value = self.page[at]
            if not self.read:
                self.read, self.page[NEWS] = True, 1
            return value

        def __setitem__(self, at: int, value: int) -> None:
            self.page[at] = value

    bell._page = page = Page(bell._page)  # type: ignore[assignment]
    bell.ring()
    assert not bell.hush()
    assert page.read, "somebody has news by now"
    bell.ring()
    assert bell.hush()
    assert not bell.hush()


def test_a_ring_while_the_bell_is_being_hushed_does_not_silence_the_next(
    ears: Callable[[], kombu.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two threads acknowledge one after the other, and nothing else happens in their worker."""
    receiver = ears().transport.receiver
    receiver.ring()
    hush = Bell.hush

    def hush_while_somebody_rings(bell: Bell) -> bool:
        receiver.ring()
        return hush(bell)

    with monkeypatch.context() as patched:
        patched.setattr(Bell, "hush", hush_while_somebody_rings)
        receiver.on_bell()
    receiver.ring()
    assert readable([receiver.bell.fileno()], 0)


def test_a_consumer_that_was_found_before_it_knew_that_it_slept_does_not_take_itself_for_asleep() -> None:
    sleep = Sleep()
    sleep.found(sleep.begin())  # the notification has overtaken the answer, as behind a pooler it may
    sleep.began()
    assert not sleep.is_known
    sleep.begin()
    sleep.began()
    assert sleep.is_known


def test_a_message_that_is_handed_over_again_while_it_is_in_hand_is_one(
    ears: Callable[[], kombu.Connection], client: Celery, database: Database
) -> None:
    """A crash of the server can take a message back from its sender, who sends it again, but not from its consumer."""
    connection, got = ears(), list[Any]()
    with connection.Consumer([kombu.Queue("celery")], on_message=got.append, accept=["json"]):
        for number in (1, 2):
            wait_for(lambda: asleep(database, connection), what="the consumer to sleep")
            client.send_task("t", (number,))
            if number == 1:
                connection.drain_events(timeout=20)
                receiver = connection.transport.receiver
                (given,) = receiver.held.values()
                receiver._take(Handed(receiver.sleep._nap, given.claimed))
        connection.drain_events(timeout=20)
    assert [message.payload[0] for message in got] == [[1], [2]]


def test_messages_are_handed_over_while_threads_acknowledge(
    ears: Callable[[], kombu.Connection], client: Celery, database: Database
) -> None:
    """Their identifiers are compared in Python: in between, another thread has its turn."""

    class Interrupted(UUID):
        def __eq__(self, other: object) -> bool:
            receiver.acknowledge(uuid4())
            return super().__eq__(other)

        __hash__ = UUID.__hash__

    connection, got = ears(), list[Any]()
    receiver = connection.transport.receiver
    with connection.Consumer([kombu.Queue("celery")], on_message=got.append, accept=["json"]):
        wait_for(lambda: asleep(database, connection), what="the consumer to sleep")
        client.send_task("t", (1,))
        connection.drain_events(timeout=20)
        (first,) = receiver.held.values()
        for number in range(2):
            receiver.acknowledge(Interrupted(int=number))
        receiver._take(Handed(receiver.sleep._nap, replace(first.claimed, message_id=uuid4())))
        receiver.deliver()
    assert [message.payload[0] for message in got] == [[1], [1]]


def test_a_message_that_is_published_while_a_sleeper_says_that_it_lives_is_found(
    ears: Callable[[], kombu.Connection], client: Celery, database: Database
) -> None:
    connection, got = ears(), list[Any]()
    consumers = f'"{database.schema}".pgqrs_consumers'
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, %s) > 0"
    with (
        connection.Consumer([kombu.Queue("celery")], on_message=got.append, accept=["json"]),
        database.session() as look,
    ):
        wait_for(lambda: asleep(database, connection), what="the consumer to sleep")
        watcher = connection.transport._keeper
        watcher._touched_at = float("-inf")
        with database.session() as other, other.connection.transaction():
            other.connection.execute(f"SELECT FROM {consumers} FOR NO KEY UPDATE")
            watcher.nudge()
            wait_for(
                lambda: look.connection.execute(blocked, [database.schema]).fetchone() == (1,), what="it to be blocked"
            )
            client.send_task("t", (1,))  # finds nobody whose row is free
        connection.drain_events(timeout=20)
    assert len(got) == 1
