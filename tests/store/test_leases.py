"""renew, release, requeue, expire, move_owner, and the workers' own rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from pgqrs_celery.store import leases, steps, workers
from tests.support.ledger import INTERVAL, LEASE, MAX_LOST, POISON, Ledger, Worker
from tests.support.waiting import wait_for


def renew(ledger: Ledger, worker: Worker, *task_ids: str) -> set[str]:
    return leases.renew(ledger.session, task_ids, worker_id=worker.worker_id, lease=LEASE)


def test_a_lease_is_renewed_when_a_third_of_it_is_gone_and_not_before(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    ledger.acquire("a", worker)
    ledger.advance(LEASE / 3 - 1)
    assert renew(ledger, worker, "a") == set()
    assert ledger.row("a").due == LEASE * 2 / 3 + 1
    ledger.advance(2)
    assert renew(ledger, worker, "a") == set()
    assert ledger.row("a").due == LEASE


def test_a_renewed_lease_lives_on(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    token = ledger.acquire("a", worker)
    for _ in range(10):
        ledger.advance(LEASE / 2)
        assert renew(ledger, worker, "a") == set()
        assert ledger.claim() == []
    assert ledger.ask("a", worker=Worker()).verdict == "HELD"
    assert ledger.succeed("a", token)


def test_a_worker_renews_only_what_it_runs_itself_and_hears_what_it_lost(ledger: Ledger) -> None:
    mine, other = Worker(), Worker()
    ledger.start("a", "b")
    ledger.acquire("a", mine)
    ledger.acquire("b", other)
    ledger.advance(LEASE / 2)
    assert renew(ledger, mine, "a", "b") == {"b"}
    assert (ledger.row("a").due, ledger.row("b").due) == (LEASE, LEASE / 2)


def test_a_worker_hears_that_a_takeover_has_happened(ledger: Ledger) -> None:
    mine, other = Worker(), Worker()
    ledger.start("a")
    ledger.acquire("a", mine)
    ledger.advance(LEASE + 1)
    ledger.acquire("a", other)
    before = ledger.row("a")
    assert renew(ledger, mine, "a") == {"a"}
    assert ledger.row("a") == before


def test_an_open_hand_off_is_kept_from_the_relay_by_its_owner(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    ledger.succeed("a", ledger.acquire("a", worker))
    ledger.advance(LEASE - 1)
    renew(ledger, worker, "a")
    ledger.advance(LEASE - 1)
    assert ledger.claim() == []


def test_a_received_message_is_kept_from_the_relay(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.advance(INTERVAL - 1)
    renew(ledger, Worker(), "a")
    assert ledger.row("a").due == LEASE
    ledger.advance(INTERVAL)
    assert ledger.claim() == []


def test_a_held_duplicate_does_not_delay_a_back_off(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    ledger.record(workflow_id, ledger.step("a", generation=1, delay=5.0, sent=False), lease_token=token)
    renew(ledger, Worker(), "a")
    assert ledger.row("a").due == 5.0


def test_a_far_look_is_not_brought_nearer(ledger: Ledger) -> None:
    ledger.start("a")
    for _ in range(4):
        due = ledger.row("a").due
        assert due is not None
        ledger.advance(due)
        ledger.claim()
    far = ledger.row("a").due
    assert far is not None
    assert far > LEASE
    renew(ledger, Worker(), "a")
    assert ledger.row("a").due == far


@pytest.mark.parametrize("state", ["parked", "sleeping", "handed off", "cancelled"])
def test_what_nobody_executes_is_not_renewed(ledger: Ledger, state: str) -> None:
    worker = Worker()
    ledger.start("a", "keep-open")
    token = ledger.acquire("a", worker)
    if state == "handed off":
        ledger.succeed("a", token)
        ledger.hand_off("a")
    elif state == "cancelled":
        steps.revoke(ledger.session, "a", error="{}", lease=5, generation=0, lease_token=token)
    else:
        due = "NULL" if state == "parked" else "{schema}.pgqrs_now() + interval '5 s'"
        ledger.execute(
            f"UPDATE {{schema}}.pgqrs_workflow_steps SET status = 'PAUSED', due_at = {due} WHERE task_id = 'a'"
        )
    before = ledger.row("a")
    renew(ledger, worker, "a")
    assert ledger.row("a") == before


@pytest.mark.parametrize("finish", [Ledger.succeed, Ledger.fail])
def test_a_finished_step_whose_process_is_gone_stays_due_though_its_worker_still_counts_it_as_its_own(
    ledger: Ledger, finish: Callable[..., bool]
) -> None:
    # The keeper has looked what the worker holds a moment before the worker noticed that the process is gone.
    worker = Worker()
    ledger.start("a")
    token = ledger.acquire("a", worker)
    assert finish(ledger, "a", token)
    assert steps.bereave(ledger.session, "a", worker_id=worker.worker_id, max_lost=MAX_LOST, poison=POISON)
    before = ledger.row("a")
    renew(ledger, worker, "a")
    assert ledger.row("a") == before
    assert [step.task_id for step in ledger.claim()] == ["a"]


def test_a_step_whose_hand_off_has_failed_keeps_its_time_though_its_worker_still_counts_it_as_its_own(
    ledger: Ledger,
) -> None:
    # A process that goes on with the next link has the message of this one for as long.
    worker = Worker()
    ledger.start("a")
    assert ledger.succeed("a", ledger.acquire("a", worker))
    assert ledger.break_hand_off("a", interval=LEASE / 3)
    before = ledger.row("a")
    renew(ledger, worker, "a")
    assert ledger.row("a") == before
    ledger.advance(LEASE / 3 + 1)
    assert [step.task_id for step in ledger.claim()] == ["a"]
    # Now its message has been sent again, and may be waiting in this very worker.
    renew(ledger, worker, "a")
    assert ledger.row("a").due == LEASE


@pytest.mark.parametrize("finish", [Ledger.succeed, Ledger.fail])
def test_a_finished_step_is_kept_while_its_process_hands_it_off(ledger: Ledger, finish: Callable[..., bool]) -> None:
    worker = Worker()
    ledger.start("a")
    assert finish(ledger, "a", ledger.acquire("a", worker))
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET due_at = {schema}.pgqrs_now() WHERE task_id = 'a'")
    renew(ledger, worker, "a")
    assert ledger.claim() == []


def test_a_stopping_worker_gives_everything_back_uncounted(ledger: Ledger) -> None:
    mine, other = Worker(), Worker()
    ledger.start("running", "finished", "failed", "theirs", "queued")
    ledger.acquire("running", mine)
    ledger.succeed("finished", ledger.acquire("finished", mine), "1")
    ledger.fail("failed", ledger.acquire("failed", mine))
    ledger.acquire("theirs", other)
    assert leases.release(ledger.session, app=ledger.app, worker_id=mine.worker_id) == 3
    row = ledger.row("running")
    assert (row.status, row.due, row.lost, row.sent, row.worker_id, row.lease_token) == (
        "QUEUED", 0.0, 0, False, None, None
    )  # fmt: skip
    assert [(ledger.row(t).status, ledger.row(t).due) for t in ("finished", "failed")] == [
        ("SUCCESS", 0.0),
        ("FAILED", 0.0),
    ]
    assert (ledger.row("theirs").due, ledger.row("queued").due) == (LEASE, INTERVAL)
    assert ledger.ask("running").verdict == "EXECUTE"
    assert ledger.ask("finished").verdict == "REPLAY"


def test_five_deploys_do_not_poison_a_long_step(ledger: Ledger) -> None:
    ledger.start("a")
    for _ in range(MAX_LOST * 2):
        worker = Worker()
        ledger.acquire("a", worker)
        leases.release(ledger.session, app=ledger.app, worker_id=worker.worker_id)
    row = ledger.row("a")
    assert (row.status, row.lost, row.attempt) == ("QUEUED", 0, MAX_LOST * 2)


def test_what_a_stopping_worker_had_not_begun_is_due_at_once(ledger: Ledger) -> None:
    workflow_id = ledger.start("prefetched", "running", "retry")
    ledger.acquire("running")
    token = ledger.acquire("retry")
    ledger.record(workflow_id, ledger.step("retry", generation=1, delay=60.0, sent=False), lease_token=token)
    assert leases.requeue(ledger.session, ["prefetched", "running", "retry"]) == 1
    row = ledger.row("prefetched")
    assert (row.due, row.sent) == (0.0, False)
    assert (ledger.row("running").due, ledger.row("retry").due) == (LEASE, 60.0)


def test_a_dead_worker_s_steps_are_due_but_never_what_it_put_to_sleep(ledger: Ledger) -> None:
    dead, other = Worker(), Worker()
    workflow_id = ledger.start("running", "finished", "asleep", "retry", "theirs", "handed-off")
    ledger.acquire("running", dead)
    ledger.succeed("finished", ledger.acquire("finished", dead))
    ledger.acquire("asleep", dead)
    ledger.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET status = 'PAUSED', due_at = {schema}.pgqrs_now() + interval '1 hour' "
        "WHERE task_id = 'asleep'"
    )
    token = ledger.acquire("retry", dead)
    ledger.record(workflow_id, ledger.step("retry", generation=1, delay=60.0, sent=False), lease_token=token)
    ledger.acquire("theirs", other)
    ledger.succeed("handed-off", ledger.acquire("handed-off", dead))
    ledger.hand_off("handed-off")
    assert ledger.expire(dead) == 2
    assert {step.task_id: step.was for step in ledger.claim()} == {"running": "QUEUED", "finished": "SUCCESS"}
    assert (ledger.row("asleep").due, ledger.row("retry").due, ledger.row("theirs").due) == (3600.0, 60.0, LEASE)
    assert ledger.row("running").lost == 1


def test_what_a_dead_worker_had_received_without_beginning_it_is_due_at_once_and_uncounted(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a", "b")
    assert renew(ledger, worker, "a") == set()
    assert ledger.expire(worker) == 1
    assert [step.task_id for step in ledger.claim()] == ["a"]
    row = ledger.row("a")
    assert (row.status, row.lost, row.worker_id) == ("QUEUED", 0, None)


def test_a_dead_worker_s_step_can_be_taken_before_the_relay_comes(ledger: Ledger) -> None:
    dead = Worker()
    ledger.start("a")
    ledger.acquire("a", dead)
    ledger.expire(dead)
    got = ledger.ask("a", worker=Worker())
    assert (got.verdict, got.lost) == ("EXECUTE", 1)


def test_a_dead_worker_s_step_is_sent_again_also_by_a_worker_too_young_to_judge_leases(ledger: Ledger) -> None:
    dead = Worker()
    ledger.start("a")
    ledger.acquire("a", dead)
    ledger.expire(dead)
    (claimed,) = ledger.claim(may_judge=False)
    assert (claimed.task_id, claimed.was, claimed.sent_at, claimed.lost) == ("a", "QUEUED", None, 1)
    assert ledger.ask("a", worker=Worker(), may_judge=False).verdict == "EXECUTE"


def test_a_process_that_outlives_its_dead_worker_keeps_its_work_until_somebody_replaces_it(ledger: Ledger) -> None:
    dead = Worker()
    ledger.start("a")
    token = ledger.acquire("a", dead)
    ledger.expire(dead)
    assert ledger.succeed("a", token)


def test_a_step_whose_workers_keep_dying_is_failed_at_the_limit(ledger: Ledger) -> None:
    ledger.start("a")
    for death in range(1, MAX_LOST + 1):
        dead = Worker()
        ledger.acquire("a", dead)
        ledger.expire(dead)
        assert ledger.row("a").lost == death
    row = ledger.row("a")
    assert (row.status, row.open, row.error, row.lease_token) == ("FAILED", True, POISON, None)
    (claimed,) = ledger.claim(may_judge=False)
    assert (claimed.was, claimed.lost) == ("FAILED", MAX_LOST)


def test_a_worker_with_a_new_session_takes_its_steps_along(ledger: Ledger) -> None:
    old, new, other = Worker(), Worker(), Worker()
    ledger.start("running", "finished", "theirs")
    token = ledger.acquire("running", old)
    ledger.succeed("finished", ledger.acquire("finished", old))
    ledger.acquire("theirs", other)
    leases.move_owner(ledger.session, app=ledger.app, old_id=old.worker_id, new_id=new.worker_id)
    assert [ledger.row(t).worker_id for t in ("running", "finished", "theirs")] == [
        new.worker_id,
        new.worker_id,
        other.worker_id,
    ]
    assert ledger.expire(old) == 0
    ledger.advance(LEASE / 2)
    assert renew(ledger, new, "running") == set()
    assert ledger.row("running").due == LEASE
    assert ledger.succeed("running", token)


# --- the workers' own rows


def enter(ledger: Ledger, worker_id: UUID | None = None, app: str | None = None) -> UUID:
    """A living worker: its lock belongs to a connection of its own, which stays open."""
    worker_id = worker_id or uuid4()
    workers.register(ledger.connect(), worker_id, app=app or ledger.app, hostname="celery@host", pid=4711)
    return worker_id


@pytest.mark.parametrize(
    "worker_id", [UUID(int=0), UUID(int=2**128 - 1), UUID(int=2**127), UUID(int=2**127 - 1), uuid4()]
)
def test_the_lock_key_is_the_same_in_sql_and_in_python(ledger: Ledger, worker_id: UUID) -> None:
    enter(ledger, worker_id)
    (neighbour,) = workers.neighbours(ledger.session, uuid4(), app=ledger.app, limit=8)
    assert (neighbour.worker_id, neighbour.lock_key) == (worker_id, workers.lock_key(worker_id))


def test_a_worker_is_alive_as_long_as_its_session(ledger: Ledger) -> None:
    session, worker_id, me = ledger.connect(), uuid4(), uuid4()
    workers.register(session, worker_id, app=ledger.app, hostname="celery@host", pid=4711)
    (neighbour,) = workers.neighbours(ledger.session, me, app=ledger.app, limit=8)
    assert not neighbour.free
    assert not workers.try_lock(ledger.session, neighbour.lock_key)
    pid = session.connection.info.backend_pid
    session.connection.close()
    wait_for(
        lambda: not ledger.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]), 30, "the session's end"
    )
    (neighbour,) = workers.neighbours(ledger.session, me, app=ledger.app, limit=8)
    assert neighbour.free
    assert workers.try_lock(ledger.session, neighbour.lock_key)


def test_looking_at_a_worker_does_not_make_it_look_alive_to_others(ledger: Ledger) -> None:
    session, worker_id = ledger.connect(), uuid4()
    workers.register(session, worker_id, app=ledger.app, hostname="celery@host", pid=4711)
    session.connection.execute("SELECT pg_advisory_unlock_all()")
    first, second = ledger.connect(), ledger.connect()
    with first.connection.transaction():
        assert workers.neighbours(first, uuid4(), app=ledger.app, limit=8)[0].free
        assert workers.neighbours(second, uuid4(), app=ledger.app, limit=8)[0].free


def test_neighbours_are_the_next_ones_in_the_ring(ledger: Ledger) -> None:
    ids = [UUID(int=n << 96) for n in range(1, 6)]
    for worker_id in ids:
        enter(ledger, worker_id)
    enter(ledger, UUID(int=1), app="bank")

    def seen_by(worker_id: UUID, limit: int) -> list[int]:
        return [
            n.worker_id.int >> 96 for n in workers.neighbours(ledger.session, worker_id, app=ledger.app, limit=limit)
        ]

    assert seen_by(ids[0], 2) == [2, 3]
    assert seen_by(ids[3], 2) == [5, 1]
    assert seen_by(ids[4], 8) == [1, 2, 3, 4]


def test_a_stopped_worker_is_nobody_s_neighbour(ledger: Ledger) -> None:
    worker_id = enter(ledger)
    workers.stop(ledger.session, worker_id)
    assert workers.neighbours(ledger.session, uuid4(), app=ledger.app, limit=8) == []


def test_the_watermark_of_a_queue_is_the_newest_send_time_anybody_received(ledger: Ledger) -> None:
    one, two = enter(ledger), enter(ledger)
    stranger = enter(ledger, app="bank")
    early = datetime(2029, 12, 31, tzinfo=UTC)
    late = early + timedelta(minutes=5)
    workers.beat(ledger.session, one, {"celery": early, "slow": early})
    workers.beat(ledger.session, two, {"celery": late})
    workers.beat(ledger.session, stranger, {"slow": late})
    assert workers.watermarks(ledger.session, app=ledger.app) == {"celery": late, "slow": early}


def test_a_worker_that_was_not_seen_for_a_day_has_no_watermarks(ledger: Ledger) -> None:
    worker_id = enter(ledger)
    workers.beat(ledger.session, worker_id, {"celery": datetime(2029, 12, 31, tzinfo=UTC)})
    ledger.advance(86_401)
    assert workers.watermarks(ledger.session, app=ledger.app) == {}


def test_workers_that_stopped_a_week_ago_are_forgotten(ledger: Ledger) -> None:
    old, alive = enter(ledger), enter(ledger)
    workers.stop(ledger.session, old)
    ledger.advance(6 * 86_400)
    workers.stop(ledger.session, old)
    workers.forget(ledger.session, app=ledger.app)
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workers") == [(2,)]
    ledger.advance(86_401)
    workers.forget(ledger.session, app="bank")
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workers") == [(2,)]
    workers.forget(ledger.session, app=ledger.app)
    assert ledger.execute("SELECT worker_id FROM {schema}.pgqrs_workers") == [(alive,)]


def test_two_apps_do_not_expire_each_other_s_steps(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("b", app="bank")
    ledger.acquire("b", worker)
    assert ledger.expire(worker) == 0
    assert ledger.row("b").due == LEASE
