"""Chords at the level of their statements, and sixteen finishers at once."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords, results
from pgqrs_celery.store.chords import Chord, State
from pgqrs_celery.store.payloads import Payload
from pgqrs_celery.store.results import Outcome, Part
from tests.backend.conftest import Spy
from tests.backend.test_results_store import travel

FINISHERS = 16


def finish(session: Session, chord_id: str, idx: int, status: str = "SUCCESS", text: str | None = None) -> bool:
    """Store one member's result and part, and look; say whether the chord seems complete."""
    task_id = f"{chord_id}-{idx}"
    payload = Payload(data=text or str(idx))
    part = Part(chord_id, idx, task_id, status, payload)
    assert results.store_with_part(session, Outcome(task_id, status, payload, part=part))
    return chords.peek(session, chord_id)


def close(session: Session, chord_id: str) -> State:
    """Do what a finisher does that sees the chord complete, without sending anything."""
    with session.connection.transaction():
        look = chords.look(session, chord_id)
        if look.state is State.COMPLETE:
            chords.dispatched(session, chord_id)
        elif look.state is State.FAILED:
            chords.failed(session, chord_id)
    return look.state


def test_of_sixteen_concurrent_finishers_exactly_one_completes_the_chord(database: Database, session: Session) -> None:
    chord_count, per_finisher = 25, 3
    for n in range(chord_count):
        chords.record(session, Chord(f"c{n}", "app", size=FINISHERS * per_finisher))
    barrier = threading.Barrier(FINISHERS)

    def work(me: int) -> list[str]:
        completed = []
        with database.session() as mine:
            for n in range(chord_count):
                barrier.wait()
                for k in range(per_finisher):
                    again = (me + k) % 2
                    for _ in range(1 + again):  # every other part is delivered twice
                        ready = finish(mine, f"c{n}", me * per_finisher + k)
                        if ready and close(mine, f"c{n}") is State.COMPLETE:
                            completed.append(f"c{n}")
        return completed

    with ThreadPoolExecutor(FINISHERS) as pool:
        won = Counter(chord_id for wins in pool.map(work, range(FINISHERS)) for chord_id in wins)
    assert won == {f"c{n}": 1 for n in range(chord_count)}


def test_a_failing_and_a_succeeding_last_member_agree(database: Database, session: Session) -> None:
    rounds = 100
    for n in range(rounds):
        chords.record(session, Chord(f"c{n}", "app", size=2))
    barrier = threading.Barrier(2)

    def work(me: int) -> list[State]:
        found = []
        with database.session() as mine:
            for n in range(rounds):
                barrier.wait()
                ready = finish(mine, f"c{n}", me, "FAILURE" if me else "SUCCESS")
                found.append(close(mine, f"c{n}") if ready else State.WAITING)
        return found

    with ThreadPoolExecutor(2) as pool:
        for pair in zip(*pool.map(work, range(2)), strict=True):
            assert sorted(pair) in ([State.CLOSED, State.FAILED], [State.FAILED, State.WAITING])


def test_finishers_of_one_chord_do_not_wait_for_each_other(database: Database, session: Session) -> None:
    chords.record(session, Chord("c", "app", size=2))
    with database.transaction() as first, database.transaction() as second, database.transaction() as third:
        if first.connection.info.backend_pid % 32 == second.connection.info.backend_pid % 32:
            second = third
        second.connection.execute("SET LOCAL lock_timeout = '1s'")
        finish(first, "c", 0)
        finish(second, "c", 1)
    assert chords.peek(session, "c")


def test_the_parts_come_in_the_order_of_the_header(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=12, payload=Payload(data='{"callback": 1}'), body_id="body"))
    for idx in (3, 11, 0, 7, 1, 2, 10, 4, 9, 8, 6):
        assert not finish(session, "c", idx)
    assert finish(session, "c", 5)
    with session.connection.transaction():
        look = chords.look(session, "c")
    assert (look.state, look.body_id, look.payload.data) == (State.COMPLETE, "body", '{"callback": 1}')
    assert [part.payload.data for part in look.parts] == [str(n) for n in range(12)]


def test_a_part_counts_once_and_a_success_replaces_a_failure_but_never_the_reverse(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=2))
    assert not finish(session, "c", 0, "FAILURE")
    assert not finish(session, "c", 0, "FAILURE", '"again"')
    assert not finish(session, "c", 0, "SUCCESS", '"good"')
    assert not finish(session, "c", 0, "FAILURE", '"bad"')
    assert finish(session, "c", 1)
    with session.connection.transaction():
        look = chords.look(session, "c")
    assert [(p.status, p.payload.data) for p in look.parts] == [("SUCCESS", '"good"'), ("SUCCESS", "1")]


def test_one_task_id_in_two_places_is_two_parts(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=2))
    for idx in (0, 1):
        part = Part("c", idx, "same", "SUCCESS", Payload(data=str(idx)))
        results.store_with_part(session, Outcome("same", "SUCCESS", part=part))
    assert chords.peek(session, "c")


def test_a_part_that_comes_after_the_body_was_sent_changes_nothing(session: Session, spy: Spy) -> None:
    chords.record(session, Chord("c", "app", size=1))
    assert finish(session, "c", 0)
    assert close(session, "c") is State.COMPLETE
    assert not finish(session, "c", 0)
    assert close(session, "c") is State.CLOSED
    assert spy.value("SELECT count(*) FROM {}.pgqrs_chord_parts") == 0
    assert spy.value("SELECT count(*) FROM {}.pgqrs_chord_tallies") == 0


def test_nothing_completes_before_the_size_is_known(session: Session) -> None:
    chords.record(session, Chord("c", "app"))
    assert not finish(session, "c", 0)
    assert not finish(session, "c", 1)
    chords.resize(session, Chord("c", "app", size=3))
    chords.extend(session, "c")
    assert not finish(session, "c", 2)
    assert finish(session, "c", 3)


def test_while_one_process_sends_the_body_no_other_may_and_a_dead_one_is_replaced(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=1))
    assert finish(session, "c", 0)
    with session.connection.transaction():
        assert chords.look(session, "c").state is State.COMPLETE
        chords.claim(session, "c")
    with session.connection.transaction():
        assert chords.look(session, "c").state is State.WAITING
    assert chords.ripe(session, "app", durable=False, age=0) == []
    travel(session, "61 s")
    assert [ripe.chord_id for ripe in chords.ripe(session, "app", durable=False, age=0)] == ["c"]
    assert close(session, "c") is State.COMPLETE
    assert chords.ripe(session, "app", durable=False, age=0) == []


def test_a_complete_chord_nobody_closed_is_found_by_its_own_app_only(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=1))
    chords.record(session, Chord("d", "app", size=2))
    finish(session, "c", 0)
    finish(session, "d", 0)
    assert [ripe.chord_id for ripe in chords.ripe(session, "app", durable=False, age=0)] == ["c"]
    assert chords.ripe(session, "other", durable=True, age=0) == []
    assert chords.ripe(session, "app", durable=False, age=60) == []


def durable(session: Session, spy: Spy, status: str = "RUNNING") -> int:
    return int(
        spy.value(
            "INSERT INTO {}.pgqrs_workflows (app, root_id, name, status) VALUES ('app', %s, 'w', %s) "
            "RETURNING workflow_id",
            f"root-{status}",
            status,
        )
    )


def test_nothing_happens_in_a_cancelled_run(session: Session, spy: Spy) -> None:
    run = durable(session, spy, "CANCELLED")
    chords.record(session, Chord("c", "app", size=1, workflow_id=run))
    assert finish(session, "c", 0)
    assert close(session, "c") is State.CLOSED


def test_resume_lets_only_the_failed_members_return_again(session: Session, spy: Spy) -> None:
    run = durable(session, spy)
    chords.record(session, Chord("c", "app", size=3, workflow_id=run, body_id="body"))
    for idx, status in enumerate(("SUCCESS", "FAILURE", "REVOKED")):
        ready = finish(session, "c", idx, status)
    assert ready
    assert close(session, "c") is State.FAILED
    assert not chords.peek(session, "c")
    with session.connection.transaction():
        assert chords.reopen(session, run) == [chords.Reopened("c", "body")]
    assert spy.rows("SELECT idx FROM {}.pgqrs_chord_parts") == [(0,)]
    assert not finish(session, "c", 1)
    assert finish(session, "c", 2)
    assert close(session, "c") is State.COMPLETE
    assert chords.reopen(session, run) == []


def test_recording_a_durable_chord_again_changes_nothing_but_a_plain_one_begins_anew(
    session: Session, spy: Spy
) -> None:
    run = durable(session, spy)
    for chord_id, workflow_id in (("durable", run), ("plain", None)):
        chord = Chord(chord_id, "app", size=1, workflow_id=workflow_id)
        chords.record(session, chord)
        assert finish(session, chord_id, 0)
        assert close(session, chord_id) is State.COMPLETE
        chords.record(session, chord)
    assert not finish(session, "durable", 0)
    assert finish(session, "plain", 0)


def test_recording_an_open_chord_again_keeps_the_parts_it_has(session: Session) -> None:
    chords.record(session, Chord("c", "app"))
    chords.resize(session, Chord("c", "app", size=2))
    finish(session, "c", 0)
    chords.record(session, Chord("c", "app"))
    assert finish(session, "c", 1)


def test_whether_a_run_has_an_open_chord_is_one_indexed_look(session: Session, spy: Spy) -> None:
    run = durable(session, spy)
    chords.record(session, Chord("c", "app", size=1, workflow_id=run))
    others = "SELECT 'other-' || n, 'app', 1, n FROM generate_series(1001, 4000) AS n"
    spy.rows("INSERT INTO {}.pgqrs_chords (chord_id, app, size, workflow_id) " + others + " RETURNING 1")
    spy.connection.execute(f'ANALYZE "{spy.schema}".pgqrs_chords'.encode())
    plan = spy.rows("EXPLAIN SELECT FROM {}.pgqrs_chords WHERE workflow_id = 1 AND open")
    assert any("pgqrs_chords_of_run" in line for (line,) in plan)


def test_an_abandoned_chord_is_removed_with_its_parts_but_a_slow_one_is_not(session: Session, spy: Spy) -> None:
    run = durable(session, spy)
    for chord_id, workflow_id in (("abandoned", None), ("slow", None), ("durable", run)):
        chords.record(session, Chord(chord_id, "app", size=9, expires=60, workflow_id=workflow_id))
        finish(session, chord_id, 0)
    travel(session, "50 s")
    finish(session, "slow", 1)
    travel(session, "70 s")
    assert results.prune(session).chords == 1
    assert spy.rows("SELECT chord_id FROM {}.pgqrs_chords ORDER BY 1") == [("durable",), ("slow",)]
    assert spy.rows("SELECT DISTINCT chord_id FROM {}.pgqrs_chord_parts ORDER BY 1") == [("durable",), ("slow",)]
    assert chords.delete(session, [run]) == 1
    assert spy.rows("SELECT DISTINCT chord_id FROM {}.pgqrs_chord_parts") == [("slow",)]


def test_the_look_of_a_finisher_costs_the_same_in_a_large_chord(session: Session, spy: Spy) -> None:
    chords.record(session, Chord("c", "app", size=20_000))
    for sql in (
        "INSERT INTO {}.pgqrs_chord_parts (chord_id, idx, task_id, status, data) "
        "SELECT 'c', n, n::text, 'SUCCESS', '1' FROM generate_series(1, 19000) n RETURNING 1",
        "INSERT INTO {}.pgqrs_chord_tallies SELECT 'c', n, 594 FROM generate_series(0, 31) n RETURNING 1",
    ):
        spy.rows(sql)
    plan = session.connection.execute(
        ("EXPLAIN (ANALYZE, BUFFERS) " + session.text("chords.peek")).encode(), {"chord_id": "c"}
    ).fetchall()
    assert not any("pgqrs_chord_parts" in line for (line,) in plan)


def test_a_chord_cannot_be_open_and_closed(session: Session, spy: Spy) -> None:
    chords.record(session, Chord("c", "app"))
    with pytest.raises(psycopg.errors.CheckViolation):
        spy.rows("UPDATE {}.pgqrs_chords SET open = false RETURNING 1")
