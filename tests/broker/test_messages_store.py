"""The statements of the broker, on a real Postgres, without kombu."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg import sql

from pgqrs_celery.db import Database
from pgqrs_celery.session import Connection, Session
from pgqrs_celery.store import broadcasts, consumers, messages, queues, workers
from pgqrs_celery.store.messages import Claimed, Handed, NewMessage
from pgqrs_celery.store.queues import Binding, Queue
from tests.support.asking import ask
from tests.support.stops import Stops
from tests.support.waiting import wait_for

ME, OTHER = uuid4(), uuid4()
LEASE = 30.0

Put = Callable[..., NewMessage]


def message(queue: str = "q", body: bytes = b"x", *, exchange: str = "", **fields: Any) -> NewMessage:
    return NewMessage(messages.new_id(), exchange, queue, "{}", "{}", body, **fields)


@pytest.fixture
def put(session: Session) -> Put:
    """Publish a message and return it."""

    def put(queue: str = "q", body: bytes = b"x", **fields: Any) -> NewMessage:
        new = message(queue, body, **fields)
        messages.publish(session, [new])
        return new

    return put


def claim(session: Session, *queues: str, count: int = 100, consumer: UUID = ME, **options: Any) -> list[Claimed]:
    return messages.claim(session, consumer, queues or ("q",), count=count, lease=LEASE, **options)


def bodies(claimed: list[Claimed]) -> list[bytes]:
    return [c.body for c in claimed]


def travel(session: Session, seconds: float) -> None:
    """Move the database's clock for this session."""
    session.connection.execute(
        "SELECT set_config('pgqrs.now', (now() + make_interval(secs => %s))::text, false)", [seconds]
    )


def test_messages_are_claimed_in_the_order_they_were_sent(session: Session, put: Put) -> None:
    for n in range(5):
        put(body=b"%d" % n)
    assert bodies(claim(session)) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_batch_is_claimed_in_its_order(session: Session) -> None:
    messages.publish(session, [message(body=b"%d" % n) for n in range(1000)])
    assert bodies(claim(session)) == [b"%d" % n for n in range(100)]


def test_higher_priority_is_claimed_first(session: Session, put: Put) -> None:
    put(body=b"low", priority=1)
    put(body=b"high", priority=9)
    put(body=b"middle", priority=5)
    assert bodies(claim(session)) == [b"high", b"middle", b"low"]


def test_no_message_is_leased_twice(session: Session, put: Put) -> None:
    for _ in range(3):
        put()
    first, second = claim(session, count=2), claim(session, count=2, consumer=OTHER)
    assert len(first) == 2
    assert len(second) == 1
    assert not {c.message_id for c in first} & {c.message_id for c in second}


def test_a_claim_passes_over_rows_another_one_has_locked(database: Database, session: Session, put: Put) -> None:
    put(body=b"a")
    put(body=b"b")
    with database.transaction() as busy:
        assert bodies(claim(busy, count=1)) == [b"a"]
        assert bodies(claim(session, consumer=OTHER)) == [b"b"]


def test_a_claim_takes_from_the_queues_in_the_order_given(session: Session, put: Put) -> None:
    put("a", b"a")
    put("b", b"b", priority=9)
    assert bodies(claim(session, "b", "a", count=1)) == [b"b"]
    assert bodies(claim(session, "b", "a", count=1)) == [b"a"]


def test_a_claim_locks_no_more_than_it_takes(database: Database, session: Session, put: Put) -> None:
    for queue in ("a", "b"):
        put(queue)
    with database.transaction() as busy:
        assert len(claim(busy, "a", "b", count=1)) == 1
        assert len(claim(session, "b", consumer=OTHER)) == 1


def test_publishing_again_what_may_have_arrived_is_no_duplicate(session: Session) -> None:
    new = [message(body=b"a"), message(body=b"b")]
    assert messages.publish(session, new) == messages.publish(session, new)
    assert messages.size(session, "q") == 2


def test_publishing_again_what_was_routed_is_no_duplicate(session: Session) -> None:
    for queue in ("a", "b"):
        queues.bind(session, Binding("e", queue, "", "fanout"))
    new = [message("", exchange="e")]
    messages.publish(session, new)
    messages.publish(session, new)
    assert (messages.size(session, "a"), messages.size(session, "b")) == (1, 1)


def test_a_publication_reports_what_waits_where(session: Session) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=60)
    report = {
        p.queue: p for p in messages.publish(session, [message("a"), message("a"), message("b", visible_at=soon)])
    }
    assert (report["a"].ready, report["a"].due_in) == (2, None)
    assert report["b"].ready == 0
    assert report["b"].due_in == pytest.approx(60, abs=5)


def test_a_lease_that_ended_frees_the_message_and_is_counted(session: Session, put: Put) -> None:
    put()
    assert claim(session)[0].lost == 0
    assert claim(session, consumer=OTHER) == []
    travel(session, LEASE + 1)
    again = claim(session, consumer=OTHER)[0]
    assert (again.deliveries, again.lost) == (2, 1)


def test_a_lease_that_is_extended_lasts(session: Session, put: Put) -> None:
    put()
    ids = [c.message_id for c in claim(session)]
    travel(session, LEASE - 1)
    assert messages.extend(session, ME, ids, lease=LEASE) == set(ids)
    travel(session, LEASE + 1)
    assert claim(session, consumer=OTHER) == []


def test_leases_are_extended_in_the_order_in_which_acknowledgements_are_deleted(
    session: Session, database: Database, database_dsn: str
) -> None:
    first, second, third = sorted(message().message_id for _ in range(3))
    for message_id in (third, second, first):
        messages.publish(session, [replace(message(), message_id=message_id)])
    claim(session)
    ids = [third, second, first]
    row = "SELECT message_id FROM {}.pgqrs_messages"
    stops = Stops(database_dsn, database.schema)
    with ThreadPoolExecutor(1) as thread:
        with stops.locking(f"{row} WHERE message_id = %s FOR UPDATE", second) as waiting:
            extended = thread.submit(database.call, lambda s: messages.extend(s, ME, ids, lease=LEASE))
            wait_for(waiting, what="it to be blocked")
            free = ask(database_dsn, sql.SQL(f"{row} FOR UPDATE SKIP LOCKED").format(sql.Identifier(database.schema)))
        assert extended.result() == set(ids)
    assert free == [(third,)]


def test_a_lease_that_somebody_else_has_is_not_extended(session: Session, put: Put) -> None:
    put()
    ids = [c.message_id for c in claim(session)]
    travel(session, LEASE + 1)
    claim(session, consumer=OTHER)
    assert messages.extend(session, ME, ids, lease=LEASE) == set()


def test_a_dead_consumer_s_messages_are_free_at_once(session: Session, put: Put) -> None:
    put()
    claim(session)
    assert len(claim(session, consumer=OTHER, dead=[ME])) == 1


def test_a_released_message_keeps_its_place_and_is_not_counted_as_lost(session: Session, put: Put) -> None:
    put(body=b"first")
    put(body=b"second")
    taken = claim(session, count=1)
    assert messages.release(session, ME, [taken[0].message_id]) == ["q"]
    again = claim(session)
    assert bodies(again) == [b"first", b"second"]
    assert (again[0].deliveries, again[0].lost) == (2, 0)


def test_somebody_else_s_lease_is_not_released(session: Session, put: Put) -> None:
    put()
    taken = claim(session)
    assert messages.release(session, OTHER, [taken[0].message_id]) == []
    assert claim(session, consumer=OTHER) == []


def test_a_finished_message_is_deleted_whoever_has_it(session: Session, put: Put) -> None:
    new = put()
    claim(session)
    travel(session, LEASE + 1)
    claim(session, consumer=OTHER)
    assert messages.delete(session, [new.message_id]) == [new.message_id]
    assert messages.delete(session, [new.message_id]) == []


def test_leases_move_to_the_consumer_s_new_identity(session: Session, put: Put) -> None:
    put()
    ids = [c.message_id for c in claim(session)]
    assert messages.adopt(session, OTHER, [ME], ids, lease=LEASE) == set(ids)
    assert messages.extend(session, ME, ids, lease=LEASE) == set()
    assert messages.extend(session, OTHER, ids, lease=LEASE) == set(ids)


def test_an_eta_hides_a_message_until_it_is_promoted(session: Session, put: Put) -> None:
    put(body=b"later", visible_at=datetime.now(UTC) + timedelta(seconds=10))
    put(body=b"now")
    assert bodies(claim(session)) == [b"now"]
    assert messages.promote(session, ["q"]) == []
    travel(session, 11)
    assert messages.promote(session, ["q"]) == ["q"]
    assert bodies(claim(session)) == [b"later"]


def test_an_eta_in_the_past_hides_nothing(session: Session, put: Put) -> None:
    put(visible_at=datetime.now(UTC) - timedelta(seconds=1))
    assert len(claim(session)) == 1


def test_an_expired_message_is_not_delivered_and_is_removed(session: Session, put: Put) -> None:
    put(ttl=10)
    put(ttl=1000)
    travel(session, 11)
    assert len(claim(session)) == 1
    assert queues.sweep(session, [], lease=LEASE).expired == 1
    assert messages.size(session, "q") == 0


def test_a_queue_s_time_to_live_bounds_its_messages(session: Session, put: Put) -> None:
    queues.declare(session, Queue("q", False, False, "{}", message_ttl=5))
    put(ttl=1000)
    put()
    travel(session, 6)
    assert claim(session) == []


def test_a_buried_message_waits_in_the_dead_letter_queue(session: Session, put: Put) -> None:
    put(body=b"bad", priority=5)
    taken = claim(session)[0]
    assert messages.bury(session, ME, [(taken.message_id, '{"x-death": 1}')], queue="dead", retention=60) == 1
    assert claim(session, consumer=OTHER) == []
    found = claim(session, "dead")[0]
    assert (found.body, found.headers, found.deliveries, found.lost) == (b"bad", '{"x-death": 1}', 1, 0)


def test_a_purge_leaves_what_is_leased(session: Session, put: Put) -> None:
    for _ in range(3):
        put()
    put(visible_at=datetime.now(UTC) + timedelta(hours=1))
    taken = claim(session, count=1)
    assert messages.purge(session, "q") == 3
    assert messages.extend(session, ME, [taken[0].message_id], lease=LEASE)


@pytest.mark.parametrize(
    ("pattern", "key", "routed"),
    [
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("#.c", "a.b.c", True),
        ("#.c", "c", True),
        ("#.c", "abc", False),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("#", "", True),
        ("#", "a.b", True),
        ("a+b.*", "a+b.x", True),
        ("a+b.*", "aab.x", False),
    ],
)
def test_topics_are_matched_as_amqp_has_it(session: Session, pattern: str, key: str, routed: bool) -> None:
    from pgqrs_celery.transport.amqp import topic_pattern

    queues.bind(session, Binding("t", "q", pattern, "topic", topic_pattern(pattern)))
    messages.publish(session, [message(key, exchange="t")])
    assert messages.size(session, "q") == int(routed)


def test_two_bindings_of_one_queue_deliver_one_copy(session: Session) -> None:
    queues.bind(session, Binding("t", "q", "a.*", "topic", r"^a\.[^.]+$"))
    queues.bind(session, Binding("t", "q", "#", "topic", "^.*$"))
    messages.publish(session, [message("a.b", exchange="t")])
    assert messages.size(session, "q") == 1


def test_a_message_without_a_route_is_dropped(session: Session) -> None:
    assert messages.publish(session, [message("nowhere", exchange="t")]) == []


def test_volatile_queues_are_taken_for_good(session: Session, put: Put) -> None:
    queues.declare(session, Queue("v", True, True, "{}"))
    put("v", b"one")
    put("v", b"two", priority=5)
    assert [t.body for t in broadcasts.take(session, ["v"], count=10)] == [b"two", b"one"]
    assert broadcasts.take(session, ["v"], count=10) == []
    assert claim(session, "v") == []


def test_a_durable_queue_stays_durable_whatever_it_is_declared_as(session: Session, put: Put) -> None:
    queues.declare(session, Queue("q", False, False, "{}"))
    queues.declare(session, Queue("q", True, False, "{}"))
    put("q")
    assert len(claim(session)) == 1


def test_deleting_a_queue_takes_bindings_and_messages_with_it(session: Session, put: Put) -> None:
    queues.declare(session, Queue("q", False, False, "{}"))
    queues.bind(session, Binding("e", "q", "k", "direct"))
    put("q")
    assert queues.delete(session, ["q"]) == 1
    assert queues.bindings(session) == []
    assert queues.find(session, "q") is None


def test_an_expiring_queue_ends_only_without_consumers(session: Session) -> None:
    queues.declare(session, Queue("q", True, True, "{}", expires_after=10))
    register(session, ME, "q")
    travel(session, 11)
    assert queues.sweep(session, [], lease=LEASE).deserted == []
    consumers.remove(session, ME, leasing=False)
    assert queues.sweep(session, ["q"], lease=LEASE).deserted == []
    assert queues.sweep(session, [], lease=LEASE).deserted == []
    travel(session, 22)
    assert queues.sweep(session, [], lease=LEASE).deserted == ["q"]


def test_an_auto_deleted_queue_ends_with_its_last_consumer(session: Session) -> None:
    queues.declare(session, Queue("q", True, True, "{}"))
    register(session, ME, "q")
    register(session, OTHER, "q")
    assert queues.deserted(session, ["q"], besides=ME) == []
    consumers.remove(session, OTHER, leasing=False)
    assert queues.deserted(session, ["q"], besides=ME) == ["q"]


def register(session: Session, consumer: UUID, *queues: str, locked: bool = False) -> None:
    consumers.register(session, consumer, queues=queues or ("q",), hostname="h", pid=1, locked=locked, lease=LEASE)


def fall_asleep(session: Session, consumer: UUID) -> None:
    assert not consumers.doze(session, consumer, ["q"], 1)


def test_a_wake_up_goes_to_as_many_sleepers_as_are_needed(session: Session) -> None:
    sleepers = [uuid4() for _ in range(5)]
    for sleeper in sleepers:
        register(session, sleeper)
        fall_asleep(session, sleeper)
    assert consumers.wake(session, messages.publish(session, [message(), message()])) == 2
    assert consumers.wake(session, messages.publish(session, [message() for _ in range(9)])) == 3
    assert consumers.wake(session, messages.publish(session, [message()])) == 0


def empty(session: Session, schema: str, table: str) -> None:
    """Leave a table as it is when autovacuum has visited it while it held nothing: Postgres expects one row in it."""
    session.connection.execute(f'DELETE FROM "{schema}".{table}'.encode())
    session.connection.execute(f'VACUUM (TRUNCATE off, ANALYZE) "{schema}".{table}'.encode())


def test_a_message_wakes_one_sleeper_whatever_statistics_say(database: Database, session: Session) -> None:
    def all_asleep() -> None:
        for sleeper in [uuid4() for _ in range(5)]:
            register(session, sleeper)
            fall_asleep(session, sleeper)

    all_asleep()
    empty(session, database.schema, "pgqrs_consumers")
    all_asleep()
    post(session, message())
    still = f'SELECT count(*) FROM "{database.schema}".pgqrs_consumers WHERE asleep'
    assert session.connection.execute(still.encode()).fetchone() == (4,)


def test_as_many_are_taken_or_promoted_as_were_asked_for_whatever_statistics_say(
    database: Database, session: Session
) -> None:
    queues.declare(session, Queue("v", True, True, "{}"))

    def fill() -> None:
        messages.publish(session, [message("v") for _ in range(30)])
        messages.publish(session, [message(visible_at=datetime.now(UTC) + timedelta(hours=1)) for _ in range(510)])

    fill()
    for table in ("pgqrs_broadcasts", "pgqrs_messages"):
        empty(session, database.schema, table)
    fill()
    assert len(broadcasts.take(session, ["v"], count=5)) == 5
    travel(session, 7200)
    assert len(messages.promote(session, ["q"])) == 500


def test_nobody_is_woken_for_an_eta_that_is_looked_at_in_time(session: Session) -> None:
    register(session, ME)
    fall_asleep(session, ME)
    later = message(visible_at=datetime.now(UTC) + timedelta(hours=1))
    assert consumers.wake(session, messages.publish(session, [later])) == 0
    soon = message(visible_at=datetime.now(UTC) + timedelta(seconds=1))
    assert consumers.wake(session, messages.publish(session, [soon])) == 1


def test_who_may_look_rarely_is_told_of_an_eta_before_its_longest_pause_ends(session: Session) -> None:
    register(session, ME)
    for seconds, told in ((messages.LONGEST_LOOK - 1, 1), (messages.LONGEST_LOOK + 5, 0)):
        eta = message(visible_at=datetime.now(UTC) + timedelta(seconds=seconds))
        assert consumers.wake(session, messages.publish(session, [eta])) == told


def listening(database: Database, consumer: UUID) -> Connection:
    connection = database.connect()
    connection.execute(f'LISTEN "{consumers.channel(consumer)}"')
    return connection


def heard(connection: Connection) -> list[str]:
    """What has been notified so far: the connection's own notification comes last."""
    channel = f"own_{uuid4().hex}"
    connection.execute(f"LISTEN {channel}")
    connection.execute(f"NOTIFY {channel}, 'end'")
    payloads = []
    for notification in connection.notifies(timeout=10):
        if notification.channel == channel:
            break
        payloads.append(notification.payload)
    return payloads


def post(session: Session, new: NewMessage) -> None:
    messages.post(session, new, wake=True)


def sleep(session: Session, consumer: UUID = ME, *queues: str) -> None:
    register(session, consumer, *(queues or ("q",)), locked=True)
    assert not consumers.doze(session, consumer, queues or ("q",), 7)


def test_a_message_for_a_sleeper_comes_leased_with_the_notification_that_wakes_it(
    database: Database, session: Session
) -> None:
    sleep(session)
    new = message(body=b'\x00 a "body" \xff' * 100, priority=3)
    with listening(database, ME) as mine:
        post(session, new)
        (payload,) = heard(mine)
    given = messages.handed(payload)
    assert given is not None
    assert given == Handed(7, Claimed(new.message_id, given.claimed.position, "q", 3, 1, 0, "{}", "{}", new.body))
    assert messages.extend(session, ME, [new.message_id], lease=LEASE) == {new.message_id}
    assert claim(session, consumer=OTHER) == []


def test_a_sleeper_who_cannot_listen_is_handed_nothing(session: Session) -> None:
    register(session, ME)
    assert not consumers.doze(session, ME, ["q"], 1)
    post(session, message(body=b"x"))
    assert bodies(claim(session)) == [b"x"]


def test_only_one_message_is_handed_to_a_sleeper_who_then_looks_himself(database: Database, session: Session) -> None:
    sleep(session)
    with listening(database, ME) as mine:
        post(session, message(body=b"first"))
        post(session, message(body=b"second"))
        assert len(heard(mine)) == 1
    assert consumers.doze(session, ME, ["q"], 1)
    assert bodies(claim(session)) == [b"second"]


@pytest.mark.parametrize(
    ("queue", "body"), [("q", b"x" * 6000), ("q", b"x" * 100_000), ("a\x1fb", b"x")], ids=["large", "huge", "name"]
)
def test_what_does_not_fit_into_a_notification_is_claimed(
    queue: str, body: bytes, database: Database, session: Session
) -> None:
    sleep(session, ME, queue)
    with listening(database, ME) as mine:
        post(session, message(queue, body))
        assert heard(mine) == ["ready"]
    assert messages.handed("ready") is None
    assert bodies(claim(session, queue)) == [body]


@pytest.mark.parametrize("length", range(5400, 5520, 7))
def test_no_size_is_too_large_for_a_notification_that_is_sent(length: int, session: Session) -> None:
    sleep(session)
    post(session, message(body=b"x" * length))
    assert messages.size(session, "q") in (0, 1)


def test_a_message_sent_again_is_not_handed_out_again(database: Database, session: Session) -> None:
    new = message()
    messages.publish(session, [new])
    assert len(claim(session, consumer=OTHER)) == 1
    sleep(session)
    with listening(database, ME) as mine:
        post(session, new)
        assert heard(mine) == ["ready"]


def test_what_was_handed_to_a_consumer_that_has_just_ended_goes_to_another(
    database: Database, session: Session
) -> None:
    sleep(session)
    register(session, OTHER)
    post(session, message(body=b"x"))
    with listening(database, OTHER) as others:
        consumers.remove(session, ME, leasing=True)
        assert heard(others) == ["look"]
    sight = watch(session, OTHER)
    assert (sight.dead, sight.ready) == ([ME], True)
    assert bodies(claim(session, consumer=OTHER, dead=sight.dead)) == [b"x"]


def test_a_new_consumer_is_announced_to_those_it_will_share_with(database: Database, session: Session) -> None:
    register(session, ME)
    register(session, OTHER, "elsewhere")
    with listening(database, ME) as mine, listening(database, OTHER) as others:
        register(session, uuid4())
        assert heard(mine) == ["look"]
        assert heard(others) == []


def test_the_end_of_a_consumer_is_announced_to_those_it_shared_with(database: Database, session: Session) -> None:
    third = uuid4()
    register(session, ME)
    register(session, OTHER, locked=True)
    register(session, third)
    with listening(database, ME) as mine, listening(database, third) as others:
        assert watch(session).suspects == [OTHER]
        assert heard(others) == []
        assert watch(session, suspects=[OTHER]).dead == [OTHER]
        assert (heard(mine), heard(others)) == ([], ["look"])


def test_everybody_is_hailed_who_lives(database: Database, session: Session) -> None:
    register(session, ME, "one")
    register(session, OTHER, "two")
    with listening(database, ME) as mine, listening(database, OTHER) as others:
        consumers.hail(session)
        assert heard(mine) == heard(others) == ["look"]


def test_a_wide_look_tries_the_locks_of_all_and_not_only_of_the_next_few(session: Session) -> None:
    register(session, ME)
    dead = {uuid4() for _ in range(3 * consumers.NEAR)}
    for one in dead:
        register(session, one, locked=True)
    assert len(watch(session).suspects) == consumers.NEAR
    assert set(watch(session, wide=True).suspects) == dead


def test_a_consumer_is_watched_while_its_company_are_workers_of_watched_apps(session: Session) -> None:
    register(session, ME)
    assert watch(session, watched_apps=["shop"]).watched
    assert not watch(session).watched
    assert not watch(session, watched_apps=["shop"], judge=False).watched
    worker, host = uuid4(), "h"
    consumers.register(session, OTHER, queues=["q"], hostname=host, pid=7, locked=False, lease=LEASE)
    assert not watch(session, watched_apps=["shop"]).watched
    workers.register(session, uuid4(), app="shop", hostname=f"w@{host}", pid=8)
    workers.register(session, uuid4(), app="shop", hostname="w@elsewhere", pid=7)
    workers.register(session, uuid4(), app="other", hostname=f"w@{host}", pid=7)
    workers.register(session, uuid4(), app="shop", hostname=f"w@{host}", pid=7, locked=False)
    assert not watch(session, watched_apps=["shop"]).watched
    workers.register(session, worker, app="shop", hostname=f"w@{host}", pid=7)
    assert watch(session, watched_apps=["shop"]).watched
    workers.stop(session, worker)
    assert not watch(session, watched_apps=["shop"]).watched


def watch(session: Session, consumer: UUID = ME, **options: Any) -> consumers.Sight:
    given = {"queues": ["q"], "volatile": [], "suspects": [], "judge": True} | options
    return consumers.watch(session, consumer, **given)


def test_a_neighbour_is_dead_when_its_lock_was_free_on_two_looks(database: Database, session: Session) -> None:
    register(session, ME)
    register(session, OTHER, locked=True)
    with database.session() as alive:
        consumers.lock(alive, OTHER)
        assert watch(session).suspects == []
        alive.connection.close()
    first = watch(session)
    while first.suspects == []:  # the server notices a closed socket a moment later
        first = watch(session)
    assert (first.suspects, first.dead) == ([OTHER], [])
    second = watch(session, suspects=first.suspects)
    assert (second.suspects, second.dead) == ([], [OTHER])


def test_who_a_consumer_was_before_is_dead_even_if_the_server_has_forgotten_it(session: Session) -> None:
    consumers.register(session, ME, queues=["q"], hostname="h", pid=1, locked=False, lease=LEASE, formers=[OTHER])
    assert watch(session).dead == [OTHER]


def test_nobody_is_judged_by_a_young_session(session: Session) -> None:
    register(session, ME)
    register(session, OTHER, locked=True)
    sight = watch(session, judge=False, suspects=[OTHER])
    assert (sight.suspects, sight.dead) == ([], [])


def test_a_young_session_judges_who_registered_with_the_same_server(session: Session) -> None:
    register(session, ME)
    register(session, OTHER, locked=True)
    assert watch(session, judge=False, settled=True).suspects == [OTHER]
    assert watch(session, judge=False, settled=True, watched_apps=["shop"], queues=["none"]).watched is False
    session.connection.execute(
        f"UPDATE \"{schema_of(session)}\".pgqrs_consumers SET server_started_at = server_started_at - interval '1 day' "
        "WHERE consumer_id = %s",
        [OTHER],
    )
    assert watch(session, judge=False, settled=True, suspects=[OTHER]) == watch(session, judge=False, settled=False)
    assert watch(session, suspects=[OTHER]).dead == [OTHER]


def test_a_look_sees_work_that_a_dead_consumer_has_left(session: Session, put: Put) -> None:
    register(session, ME)
    register(session, OTHER, locked=True)
    put()
    claim(session, consumer=OTHER)
    assert not watch(session).ready
    watch(session, suspects=[OTHER])
    assert watch(session).ready


def test_a_look_tells_when_the_next_eta_is_due(session: Session, put: Put) -> None:
    register(session, ME)
    assert watch(session).due_in is None
    put(visible_at=datetime.now(UTC) + timedelta(seconds=100))
    assert watch(session).due_in == pytest.approx(100, abs=5)


def plan(session: Session, name: str, params: dict[str, Any]) -> str:
    rows = session.connection.execute("EXPLAIN (ANALYZE, BUFFERS OFF) " + session.text(name), params)  # type: ignore[arg-type]
    return "\n".join(row[0] for row in rows)


def test_a_claim_reads_no_more_of_a_backlog_than_it_takes(session: Session) -> None:
    for _ in range(20):
        messages.publish(session, [message(body=b"x" * 100) for _ in range(1000)])
    later = datetime.now(UTC) + timedelta(days=1)
    for _ in range(5):
        messages.publish(session, [message(visible_at=later) for _ in range(1000)])
    session.connection.execute(f'ANALYZE "{schema_of(session)}".pgqrs_messages')
    given = {"consumer_id": ME, "queues": ["q"], "count": 10, "lease": LEASE, "dead": [], "done": [], "awake": False}
    found = plan(session, "messages.claim", given)
    assert "pgqrs_messages_ready" in found
    assert "Seq Scan on pgqrs_messages" not in found


def schema_of(session: Session) -> str:
    row = session.row("migrations.table_exists")
    assert row
    return session.text("messages.size").split('"')[1]
