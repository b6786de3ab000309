"""A consumer never holds more messages than its prefetch allows: with one, long tasks are not hoarded."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import kombu
import psycopg
import pytest
from kombu.asynchronous import Hub

from pgqrs_celery.db import Database
from pgqrs_celery.store import consumers, messages
from pgqrs_celery.store.messages import NewMessage
from tests.support.waiting import wait_for

COUNT = 12


def leased(database: Database) -> int:
    statement = f"SELECT count(*) FROM {database.schema}.pgqrs_messages WHERE leased_by IS NOT NULL"
    with database.session() as session:
        row = session.connection.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


def drain(connection: kombu.Connection) -> None:
    """Take everything that comes."""
    with suppress(socket.timeout):
        while True:
            connection.drain_events(timeout=0.05)


@pytest.fixture
def queue(connection: kombu.Connection) -> kombu.Queue:
    """A queue with some messages."""
    queue = kombu.Queue("prefetch", routing_key="prefetch")
    producer = kombu.Producer(connection.channel())
    for body in range(COUNT):
        producer.publish(body, routing_key=queue.routing_key, declare=[queue])
    return queue


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_more_is_leased_than_the_prefetch_allows_while_draining(
    connection: kombu.Connection, queue: kombu.Queue, database: Database, prefetch: int
) -> None:
    held: list[Any] = []
    seen, most = [], 0
    consumer = kombu.Consumer(
        connection, [queue], prefetch_count=prefetch, callbacks=[lambda b, m: held.append((b, m))]
    )
    with consumer:
        while len(seen) < COUNT:
            full = min(prefetch, COUNT - len(seen))
            wait_for(lambda full=full: drain(connection) or len(held) >= full, what="the prefetch to be made use of")
            most = max(most, leased(database))
            assert len(held) == full
            body, message = held.pop(0)
            seen.append(body)
            message.ack()
    assert seen == list(range(COUNT))
    assert most == prefetch


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_more_is_leased_than_the_prefetch_allows_in_an_event_loop(
    connection: kombu.Connection, queue: kombu.Queue, database: Database, prefetch: int
) -> None:
    held: list[Any] = []
    seen: list[int] = []
    hub, rest = Hub(), threading.Event()
    consumer = kombu.Consumer(
        connection, [queue], prefetch_count=prefetch, callbacks=[lambda b, m: held.append((b, m))]
    )

    def loop() -> None:
        connection.register_with_event_loop(hub)
        while not rest.is_set():
            hub.run_once()

    def release() -> None:
        body, message = held.pop(0)
        seen.append(body)
        message.ack()

    hub.call_repeatedly(0.05, lambda: None)
    with consumer:
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            for left in range(COUNT, 0, -1):
                wait_for(lambda left=left: len(held) >= min(prefetch, left), what="the prefetch to be full")
                assert leased(database) <= prefetch
                assert len(held) <= prefetch
                hub.call_soon(release)
                wait_for(lambda left=left: len(seen) > COUNT - left, what="a message to be acknowledged")
        finally:
            rest.set()
            thread.join()
    assert seen == list(range(COUNT))


def test_answers_are_delivered_one_by_one(connection: kombu.Connection) -> None:
    # ``inspect`` counts its calls, and would wait for the rest of its timeout for an answer it already has.
    got: list[Any] = []
    queue = kombu.Queue("answers", routing_key="answers", durable=False, auto_delete=True)
    with kombu.Consumer(connection, [queue], callbacks=[lambda body, message: got.append(body)], no_ack=True):
        producer = kombu.Producer(connection.channel())
        for body in range(COUNT):
            producer.publish(body, routing_key=queue.routing_key)
        for count in range(1, COUNT + 1):
            connection.drain_events(timeout=20)
            assert len(got) == count
    assert got == list(range(COUNT))


PROPERTIES = '{"content_type": "application/json", "content_encoding": "utf-8"}'


def hand(database: Database, body: bytes) -> None:
    """Publish as another process does: to one who sleeps, with the notification that wakes it."""
    with database.session() as session:
        messages.post(session, new_message(body), wake=True)


def new_message(body: bytes) -> NewMessage:
    return NewMessage(messages.new_id(), "", "prefetch", "{}", PROPERTIES, body)


def asleep(database: Database, connection: kombu.Connection) -> bool:
    """Whether a consumer sleeps; lets it come to that."""
    drain(connection)
    return sleeps(database)


def sleeps(database: Database) -> bool:
    """Whether the database takes a consumer for asleep."""
    with database.session() as session:
        statement = f"SELECT count(*) FROM {database.schema}.pgqrs_consumers WHERE asleep"
        row = session.connection.execute(statement.encode()).fetchone()
    return row == (1,)


def pretend(database: Database, what: str) -> None:
    """Let the database believe something of all consumers that was true a moment ago."""
    with database.session() as session:
        session.connection.execute(f"UPDATE {database.schema}.pgqrs_consumers SET {what}".encode())


def test_a_message_that_comes_with_its_notification_counts_and_one_too_many_goes_back(
    connection: kombu.Connection, database: Database
) -> None:
    held: list[Any] = []
    queue = kombu.Queue("prefetch", routing_key="prefetch")
    with kombu.Consumer(connection, [queue], prefetch_count=1, callbacks=[lambda b, m: held.append((b, m))]):
        wait_for(lambda: asleep(database, connection), 10, "the consumer to sleep")
        hand(database, b"1")
        assert leased(database) == 1
        wait_for(lambda: drain(connection) or held, 10, "the message")
        pretend(database, "asleep = true")
        hand(database, b"2")
        assert leased(database) == 2
        wait_for(lambda: drain(connection) or leased(database) == 1, 10, "the second message to go back")
        ((body, message),) = held
        assert body == 1
        message.ack()
        wait_for(lambda: drain(connection) or len(held) == 2, 10, "the second message")
        assert held[1][0] == 2
        held[1][1].ack()


def test_a_message_for_a_consumer_that_has_left_the_queue_goes_back(
    connection: kombu.Connection, database: Database
) -> None:
    other = kombu.Queue("other", routing_key="other")
    with kombu.Consumer(connection, [other], callbacks=[lambda b, m: m.ack()]):
        wait_for(lambda: asleep(database, connection), 10, "the consumer to sleep")
        pretend(database, "queues = queues || ARRAY['prefetch']")
        hand(database, b"1")
        assert leased(database) == 1
        wait_for(lambda: drain(connection) or leased(database) == 0, 10, "the message to go back")


@pytest.fixture
def handed_out(connection: kombu.Connection, database: Database) -> Iterator[list[int]]:
    """What was handed out by a consumer that sleeps now; each time the database must come to know that it is awake."""
    bodies: list[int] = []

    def take(body: int, message: kombu.Message) -> None:
        # As a task in the main process does: nothing else is done by this thread meanwhile.
        wait_for(lambda: not sleeps(database), 10, "the database to know that the consumer is awake")
        bodies.append(body)
        message.ack()

    queue = kombu.Queue("prefetch", routing_key="prefetch")
    with kombu.Consumer(connection, [queue], prefetch_count=1, callbacks=[take]):
        wait_for(lambda: asleep(database, connection), 10, "the consumer to sleep")
        yield bodies


def overhear(database: Database, body: bytes) -> tuple[str, str]:
    """Hand a message to the only consumer, which sleeps; return the channel and the payload of the notification."""
    with psycopg.connect(database.dsn, autocommit=True) as other:
        statement = f"SELECT consumer_id FROM {database.schema}.pgqrs_consumers"
        ((consumer_id,),) = other.execute(statement.encode()).fetchall()
        channel = consumers.channel(consumer_id)
        other.execute(f'LISTEN "{channel}"'.encode())
        hand(database, body)
        (heard,) = other.notifies(timeout=10, stop_after=1)
    return channel, heard.payload


def test_a_message_whose_notification_comes_a_nap_too_late_finds_its_consumer_awake_when_it_is_handed_out(
    connection: kombu.Connection, database: Database, handed_out: list[int]
) -> None:
    channel, payload = overhear(database, b"1")
    wait_for(lambda: drain(connection) or handed_out, 10, "the message")
    wait_for(lambda: asleep(database, connection), 10, "the consumer to sleep again")
    with database.session() as session:
        session.connection.execute("SELECT pg_notify(%s, %s)", (channel, payload))
    wait_for(lambda: drain(connection) or len(handed_out) == 2, 10, "the message")
    assert handed_out == [1, 1]


def test_a_consumer_that_is_told_to_look_is_awake_when_it_hands_out_what_it_finds(
    connection: kombu.Connection, database: Database, handed_out: list[int]
) -> None:
    with database.transaction() as session:
        messages.publish(session, [new_message(b"1")])
        consumers.tell(session, ["prefetch"])
    wait_for(lambda: drain(connection) or handed_out, 10, "the message")
    assert handed_out == [1]
