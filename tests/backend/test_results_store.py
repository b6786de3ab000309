"""Results at the level of their statements."""

from __future__ import annotations

import pytest

from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords, results, waiters
from pgqrs_celery.store.chords import Chord
from pgqrs_celery.store.payloads import Payload
from pgqrs_celery.store.results import Outcome, Part
from tests.backend.conftest import Spy


def outcome(task_id: str, status: str = "SUCCESS", text: str = "1", expires: float | None = None) -> Outcome:
    return Outcome(task_id, status, Payload(data=text), expires)


def stored(session: Session, task_id: str) -> tuple[str, str | None] | None:
    found = results.fetch(session, task_id)
    return None if found is None else (found.status, found.payload.data)


def travel(session: Session, interval: str) -> None:
    """Move this session's clock."""
    session.connection.execute(
        "SELECT set_config('pgqrs.now', (clock_timestamp() + %s::interval)::text, false)", [interval]
    )


@pytest.fixture(autouse=True)
def own_time(session: Session) -> None:
    session.connection.execute("SELECT set_config('pgqrs.now', '', false)")


def test_every_state_replaces_the_one_before_until_the_first_success(session: Session) -> None:
    for status in ("PENDING", "STARTED", "RETRY", "MY_STATE", "FAILURE", "SUCCESS"):
        assert results.store(session, outcome("t", status, f'"{status}"'))
        assert stored(session, "t") == (status, f'"{status}"')
    for status in ("SUCCESS", "FAILURE", "STARTED"):
        assert not results.store(session, outcome("t", status, '"late"'))
    assert stored(session, "t") == ("SUCCESS", '"SUCCESS"')


def test_an_expired_result_is_invisible_and_can_be_replaced_before_it_is_removed(session: Session, spy: Spy) -> None:
    results.store(session, outcome("t", expires=60))
    results.store(session, outcome("kept"))
    travel(session, "61 s")
    assert stored(session, "t") is None
    assert [r.task_id for r in results.fetch_many(session, ["t", "kept"])] == ["kept"]
    assert spy.value("SELECT count(*) FROM {}.pgqrs_task_results") == 2
    assert results.store(session, outcome("t", "FAILURE", expires=60))
    assert stored(session, "t") == ("FAILURE", "1")


def test_json_text_is_kept_verbatim(session: Session) -> None:
    text = '{"b": 1e16, "a": [1.0, 12345678901234567890], "b": "\\u0000"}'
    results.store(session, outcome("t", text=text))
    assert stored(session, "t") == ("SUCCESS", text)


def test_prune_removes_what_has_expired_in_batches(session: Session) -> None:
    for n in range(7):
        results.store(session, outcome(f"t{n}", expires=60))
    results.store(session, outcome("kept"))
    results.save_group(session, "g", Payload(data="1"), 60)
    assert results.prune(session).total == 0
    travel(session, "61 s")
    first = results.prune(session, limit=5)
    assert (first.results, first.groups, first.more) == (5, 1, True)
    second = results.prune(session, limit=5)
    assert (second.results, second.more) == (2, False)
    assert stored(session, "kept") is not None


def test_a_batch_is_a_batch_in_tables_that_were_empty_when_they_were_vacuumed(session: Session, spy: Spy) -> None:
    """Then Postgres expects one row, and would look for the batch once for every row of the table."""

    def fill() -> None:
        for n in range(30):
            results.store(session, outcome(f"t{n}", expires=60))
            results.save_group(session, f"g{n}", Payload(data="1"), 60)
            waiters.register(session, "channel", [f"w{n}"])

    fill()
    for table in ("task_results", "groups", "waiters"):
        spy.connection.execute(f'DELETE FROM "{spy.schema}".pgqrs_{table}'.encode())
        spy.connection.execute(f'VACUUM (TRUNCATE off, ANALYZE) "{spy.schema}".pgqrs_{table}'.encode())
    fill()
    travel(session, "2 days")
    pruned = results.prune(session, limit=5)
    assert (pruned.results, pruned.groups, pruned.waiters, pruned.more) == (5, 5, 5, True)


def test_prune_passes_over_rows_that_somebody_holds(session: Session, spy: Spy) -> None:
    for n in range(4):
        results.store(session, outcome(f"t{n}", expires=60))
    travel(session, "61 s")
    session.connection.execute("SET lock_timeout = '2s'")
    with spy.connection.transaction():
        spy.rows("SELECT * FROM {}.pgqrs_task_results WHERE task_id = 't0' FOR UPDATE")
        assert results.prune(session).results == 3
    assert results.prune(session).results == 1


def test_forget_failures_spares_successes(session: Session) -> None:
    for task_id, status in (("a", "FAILURE"), ("b", "SUCCESS"), ("c", "REVOKED"), ("d", "STARTED")):
        results.store(session, outcome(task_id, status))
    assert results.forget_failures(session, ["a", "b", "c", "d", "e"]) == 2
    assert {r.task_id for r in results.fetch_many(session, ["a", "b", "c", "d"])} == {"b", "d"}


def test_a_result_and_its_part_are_stored_both_or_neither(database: Database, session: Session, spy: Spy) -> None:
    chords.record(session, Chord("c", "app", size=1))
    broken = Outcome("t", "SUCCESS", Payload(data="1"), part=Part("c", 0, "t", "SUCCESS", Payload(data="not json")))
    with pytest.raises(StoreError), database.session() as other:
        results.store_with_part(other, broken)
    assert stored(session, "t") is None
    sound = Outcome("t", "SUCCESS", Payload(data="1"), part=Part("c", 0, "t", "SUCCESS", Payload(data="2")))
    assert results.store_with_part(session, sound)
    assert stored(session, "t") == ("SUCCESS", "1")
    assert spy.rows("SELECT idx, task_id, status, data::text FROM {}.pgqrs_chord_parts") == [(0, "t", "SUCCESS", "2")]


def test_nothing_is_stored_where_the_hand_off_is_not_accepted(session: Session, spy: Spy) -> None:
    """What the durable core does: result and part hang on the RETURNING of its own UPDATE."""
    chords.record(session, Chord("c", "app", size=1))
    spy.rows(
        "INSERT INTO {}.pgqrs_workflow_steps (workflow_id, step_id, app, task_id, task_name, status, open) "
        "VALUES (1, 's', 'app', 't', 'n', 'SUCCESS', true) RETURNING 1"
    )
    hand_off = (
        f'UPDATE "{spy.schema}".pgqrs_workflow_steps SET open = false '
        "WHERE task_id = %(step)s AND open AND status = %(step_status)s RETURNING 1"
    )
    whole = Outcome("t", "SUCCESS", Payload(data="1"), part=Part("c", 0, "t", "SUCCESS", Payload(data="2")))

    def hand_over(status: str) -> bool:
        params = {"step": "t", "step_status": status}
        return results.store_with_part(session, whole, accepted=hand_off, params=params)

    assert not hand_over("FAILED")
    assert stored(session, "t") is None
    assert spy.value("SELECT count(*) FROM {}.pgqrs_chord_parts") == 0
    assert hand_over("SUCCESS")
    assert stored(session, "t") is not None
    assert chords.peek(session, "c")
    assert not hand_over("SUCCESS")


def test_a_part_without_a_result_leaves_no_result(session: Session) -> None:
    chords.record(session, Chord("c", "app", size=1))
    assert results.store_with_part(
        session, Outcome("t", "SUCCESS", part=Part("c", 0, "t", "SUCCESS", Payload(data="2")))
    )
    assert stored(session, "t") is None
    assert chords.peek(session, "c")


def test_an_id_with_a_nul_is_refused_with_an_error_of_ours(database: Database) -> None:
    with pytest.raises(StoreError), database.session() as session:
        results.store(session, outcome("a\x00b"))
