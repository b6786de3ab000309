"""Two connections at the same time: each test holds one of them in the middle of its work and lets the other arrive."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from pgqrs_celery.session import Session
from pgqrs_celery.store import leases, runs, steps, workers
from pgqrs_celery.store.recording import Finished
from pgqrs_celery.store.runs import NewRun
from tests.support.ledger import ERROR, LEASE, Ledger, Worker, wait_until_blocked

OPEN = ("QUEUED", "RUNNING")


def test_of_two_acquires_one_executes(ledger: Ledger) -> None:
    ledger.start("a")
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert ledger.ask("a", worker=Worker()).verdict == "EXECUTE"
        second = ledger.in_thread(lambda: ledger.ask("a", worker=Worker(), session=other))
        wait_until_blocked(look, other, ledger.session, second)
    assert second.result(30).verdict == "HELD"
    assert ledger.row("a").attempt == 1


def test_of_two_takeovers_one_executes(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert ledger.ask("a", worker=Worker()).verdict == "EXECUTE"
        second = ledger.in_thread(lambda: ledger.ask("a", worker=Worker(), session=other))
        wait_until_blocked(look, other, ledger.session, second)
    assert second.result(30).verdict == "HELD"
    assert (ledger.row("a").attempt, ledger.row("a").lost) == (2, 1)


def test_zombie_that_waited_for_the_takeover_is_refused(ledger: Ledger) -> None:
    ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        owner = ledger.acquire("a", Worker())
        late = ledger.in_thread(lambda: ledger.succeed("a", zombie, "666", session=other))
        wait_until_blocked(look, other, ledger.session, late)
    assert not late.result(30)
    assert ledger.succeed("a", owner, "1")
    assert ledger.row("a").output == "1"


def test_zombie_that_waited_for_the_takeover_records_nothing(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    look, other = ledger.connect(), ledger.connect()
    finished = Finished("a", "666")
    with ledger.session.connection.transaction():
        ledger.acquire("a", Worker())
        late = ledger.in_thread(
            lambda: ledger.record(workflow_id, "b", lease_token=zombie, finished=finished, session=other)
        )
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30) == "LOST"
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_zombie_that_waited_for_the_takeover_cannot_retry(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        ledger.acquire("a", Worker())
        retry = ledger.step("a", generation=1)
        late = ledger.in_thread(lambda: ledger.record(workflow_id, retry, lease_token=zombie, session=other))
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30) == "SUPPRESS"
    assert (ledger.row("a").status, ledger.row("a").generation) == ("RUNNING", 0)


def test_a_takeover_that_waited_for_the_success_finds_it_held(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE - 1)
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert ledger.succeed("a", token, "1")
        second = ledger.in_thread(lambda: ledger.ask("a", worker=Worker(), session=other))
        wait_until_blocked(look, other, ledger.session, second)
    assert second.result(30).verdict == "HELD"


def test_a_success_that_waited_for_the_relay_is_still_accepted(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert [step.was for step in ledger.claim()] == ["RUNNING"]
        late = ledger.in_thread(lambda: ledger.succeed("a", token, "1", session=other))
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30)
    assert ledger.row("a").status == "SUCCESS"


def test_two_relays_never_claim_the_same_step_nor_wait_for_each_other(ledger: Ledger) -> None:
    for n in range(10):
        ledger.start(f"t{n}")
        ledger.advance(1)
    ledger.advance(100)
    other = ledger.connect()
    other.connection.execute("SET lock_timeout = '1ms'")
    with ledger.session.connection.transaction():
        first = {step.task_id for step in ledger.claim(batch=4)}
        second = {step.task_id for step in ledger.claim(batch=4, session=other)}
    assert (len(first), len(second)) == (4, 4)
    assert not first & second
    assert len(ledger.claim()) == 2


def test_the_relay_does_not_wait_for_a_step_somebody_is_writing(ledger: Ledger) -> None:
    ledger.start("a", "b")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    other = ledger.connect()
    other.connection.execute("SET lock_timeout = '1ms'")
    with ledger.session.connection.transaction():
        assert ledger.succeed("a", token)
        assert [step.task_id for step in ledger.claim(session=other)] == ["b"]


def test_the_keeper_does_not_wait_for_a_step_somebody_is_writing(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a", "b")
    token = ledger.acquire("a", worker)
    ledger.acquire("b", worker)
    ledger.advance(LEASE / 2)
    other = ledger.connect()
    other.connection.execute("SET lock_timeout = '1ms'")
    with ledger.session.connection.transaction():
        assert ledger.succeed("a", token)
        assert leases.renew(other, ["a", "b"], worker_id=worker.worker_id, lease=LEASE) == set()
    assert (ledger.row("a").due, ledger.row("b").due) == (LEASE / 2, LEASE)


@pytest.mark.parametrize("same", ["root", "key"])
def test_of_two_starts_one_starts(ledger: Ledger, same: str) -> None:
    look, other = ledger.connect(), ledger.connect()
    given: dict[str, Any] = {"root_id": "r"} if same == "root" else {"workflow_key": "k"}
    second = NewRun(**{"app": ledger.app, "root_id": "b", "name": "pack", **given})
    with ledger.session.connection.transaction():
        workflow_id = ledger.start("a", **given)
        late = ledger.in_thread(lambda: runs.start(other, second, [ledger.step("b")]))
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30) is None
    found = runs.find(ledger.session, root_id="r" if same == "root" else "a")
    assert found is not None
    assert found.workflow_id == workflow_id


def test_a_start_that_waited_for_one_that_was_rolled_back_starts(ledger: Ledger) -> None:
    look, other = ledger.connect(), ledger.connect()

    with ledger.session.connection.transaction(force_rollback=True):
        ledger.start("a", workflow_key="k")
        run = NewRun(ledger.app, "b", "pack", workflow_key="k")
        late = ledger.in_thread(lambda: runs.start(other, run, [ledger.step("b")]))
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30) is not None


def test_of_two_adoptions_one_is_entered(ledger: Ledger) -> None:
    look, other = ledger.connect(), ledger.connect()

    def adopt(session: Session) -> bool:
        with session.connection.transaction():
            workflow_id, _ = runs.join(session, NewRun(ledger.app, "a", "pack"), [])
            return steps.adopt(
                session,
                ledger.step("a"),
                workflow_id=workflow_id,
                app=ledger.app,
                lease_token=uuid4(),
                worker_id=None,
                lease=LEASE,
            )

    with ledger.session.connection.transaction():
        assert adopt(ledger.session)
        late = ledger.in_thread(lambda: adopt(other))
        wait_until_blocked(look, other, ledger.session, late)
    assert not late.result(30)
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflows") == [(1,)]


def test_of_two_hand_offs_one_counts(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "keep-open")
    ledger.succeed("a", ledger.acquire("a"))
    look, other = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert ledger.hand_off("a") == workflow_id
        late = ledger.in_thread(lambda: steps.hand_off(other, "a", fence=1))
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30) is None


# --- closing


def close_in_two(session: Session, workflow_id: int) -> Iterator[str | None]:
    """close_if_quiet, which stops between its statements; yields the closing status in the end."""
    quiet = session.row("runs.quiet", {"workflow_id": workflow_id})
    if not quiet or not quiet[0]:
        yield None
        return
    yield "looked"
    with session.connection.transaction():
        if session.row("runs.lock_open", {"workflow_id": workflow_id}) is None:
            yield None
            return
        yield "locked"
        closed = session.row("runs.close", {"workflow_id": workflow_id})
        yield "written"
    yield closed[0] if closed else None


def test_a_step_recorded_from_outside_before_the_closing_look_keeps_the_run_open(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed_and_hand_off("a")
    look, closer = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [ledger.step("x")])
        closing = ledger.in_thread(lambda: ledger.close_if_quiet(workflow_id, closer))
        wait_until_blocked(look, closer, ledger.session, closing)
    assert closing.result(30) is None
    assert ledger.run_status(workflow_id) in OPEN
    ledger.finish("x")
    assert ledger.run_status(workflow_id) == "SUCCESS"


@pytest.mark.parametrize("when", ["locked", "written"])
def test_a_step_recorded_from_outside_while_the_run_closes_opens_it_again(ledger: Ledger, when: str) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed_and_hand_off("a")
    look, outside = ledger.connect(), ledger.connect()
    closing = close_in_two(ledger.session, workflow_id)
    assert next(closing) == "looked"
    while next(closing) != when:
        pass

    def join() -> None:
        with outside.connection.transaction():
            runs.join(outside, NewRun(ledger.app, "a", "pack"), [ledger.step("x")])

    joining = ledger.in_thread(join)
    wait_until_blocked(look, outside, ledger.session, joining)
    assert list(closing)[-1] == "SUCCESS"
    joining.result(30)
    assert ledger.run_status(workflow_id) == "RUNNING"
    ledger.finish("x")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_a_look_from_before_the_resume_does_not_close_the_resumed_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.fail_and_hand_off("a")
    late = close_in_two(ledger.connect(), workflow_id)
    assert next(late) == "looked"
    assert ledger.close_if_quiet(workflow_id) == "FAILED"
    with ledger.session.connection.transaction():
        runs.resume(ledger.session, workflow_id)
    assert list(late)[-1] is None
    assert ledger.run_status(workflow_id) == "RUNNING"
    ledger.finish("a")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_a_look_that_waited_for_a_close_and_a_resume_does_not_close_the_resumed_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.fail_and_hand_off("a")
    other, look = ledger.connect(), ledger.connect()
    with ledger.session.connection.transaction():
        assert ledger.session.row("runs.lock_open", {"workflow_id": workflow_id})
        late = ledger.in_thread(lambda: ledger.close_if_quiet(workflow_id, other))
        wait_until_blocked(look, other, ledger.session, late)
        assert ledger.close_if_quiet(workflow_id) == "FAILED"
        runs.resume(ledger.session, workflow_id)
    assert late.result(30) is None
    assert ledger.run_status(workflow_id) == "RUNNING"
    ledger.finish("a")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_of_two_closing_looks_one_closes(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed_and_hand_off("a")
    other, look = ledger.connect(), ledger.connect()
    closing = close_in_two(ledger.session, workflow_id)
    while next(closing) != "written":
        pass
    second = ledger.in_thread(lambda: ledger.close_if_quiet(workflow_id, other))
    wait_until_blocked(look, other, ledger.session, second)
    assert list(closing)[-1] == "SUCCESS"
    assert second.result(30) is None


def test_of_two_resumes_one_resumes(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.fail_and_hand_off("a")
    ledger.close_if_quiet(workflow_id)
    other, look = ledger.connect(), ledger.connect()

    def resume(session: Session) -> int:
        with session.connection.transaction():
            return len(runs.resume(session, workflow_id)[0])

    with ledger.session.connection.transaction():
        assert resume(ledger.session) == 1
        second = ledger.in_thread(lambda: resume(other))
        wait_until_blocked(look, other, ledger.session, second)
    with pytest.raises(Exception, match="is RUNNING; only a FAILED run"):
        second.result(30)


#: What the last two members of a group do at the end, statement by statement.
def last_member(ledger: Ledger, session: Session, task_id: str, token: Any, workflow_id: int, *, fails: bool) -> Any:
    yield ledger.fail(task_id, token, ERROR, session) if fails else ledger.succeed(task_id, token, "1", session)
    yield ledger.hand_off(task_id, session)
    quiet = session.row("runs.quiet", {"workflow_id": workflow_id})
    yield quiet
    yield ledger.close_if_quiet(workflow_id, session) if quiet and quiet[0] else None


def test_a_failing_and_a_succeeding_last_member_end_the_run_failed_in_every_order_of_their_statements(
    ledger: Ledger,
) -> None:
    other = ledger.connect()
    for number, order in enumerate(set(itertools.permutations("0000" + "1111"))):
        names = (f"f{number}", f"s{number}")
        workflow_id = ledger.start(*names)
        tokens = [ledger.acquire(name) for name in names]
        members = [
            last_member(ledger, session, name, token, workflow_id, fails=name.startswith("f"))
            for session, name, token in zip((ledger.session, other), names, tokens, strict=True)
        ]
        closed = [next(members[int(who)]) for who in order].count("FAILED")
        assert (ledger.run_status(workflow_id), closed) == ("FAILED", 1), order


def test_a_failing_and_a_succeeding_last_member_at_the_same_time_end_the_run_failed_1000_times(
    live_ledger: Ledger,
) -> None:
    ledger, rounds = live_ledger, 1000
    sessions = (ledger.session, ledger.connect())
    work = []
    for n in range(rounds):
        workflow_id = ledger.start(f"f{n}", f"s{n}")
        work.append((workflow_id, ledger.acquire(f"f{n}"), ledger.acquire(f"s{n}")))
    barrier = threading.Barrier(2, timeout=60)

    def member(side: int) -> list[str | None]:
        session, closed = sessions[side], []
        for n, (workflow_id, *tokens) in enumerate(work):
            name = f"{'fs'[side]}{n}"
            barrier.wait()
            accepted = (ledger.fail, ledger.succeed)[side](name, tokens[side], session=session)
            assert accepted
            assert steps.hand_off(session, name, fence=1) == workflow_id
            closed.append(ledger.close_if_quiet(workflow_id, session))
        return closed

    both = [ledger.in_thread(functools.partial(member, side)) for side in (0, 1)]
    by_fail, by_success = (future.result(90) for future in both)
    for pair in zip(by_fail, by_success, strict=True):
        assert sorted(map(str, pair)) == ["FAILED", "None"]
    statuses = ledger.execute("SELECT status, count(*) FROM {schema}.pgqrs_workflows GROUP BY status")
    assert statuses == [("FAILED", rounds)]


# --- cancel


def test_a_step_recorded_while_the_run_is_cancelled_is_cancelled_when_it_would_begin(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    look, other = ledger.connect(), ledger.connect()

    with ledger.session.connection.transaction(force_rollback=True):
        # The same id, uncommitted, holds up the record, whose snapshot is of before the cancel.
        ledger.record(workflow_id, "b", lease_token=token)
        late = ledger.in_thread(lambda: ledger.record(workflow_id, "b", lease_token=token, session=other))
        wait_until_blocked(look, other, ledger.session, late)
        assert runs.cancel(look, workflow_id)
        assert [t for t, _ in steps.cancel_batch(look, workflow_id, batch=10)] == ["a"]
        assert steps.unfinished(look, workflow_id) == 0
    assert late.result(30) == "SEND"
    assert ledger.row("b").status == "QUEUED"
    assert ledger.ask("b").verdict == "CANCELLED"
    assert ledger.row("b").status == "CANCELLED"


def test_a_step_that_begins_while_the_run_is_cancelled_is_cancelled_after_all(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    look, other = ledger.connect(), ledger.connect()
    token = uuid4()
    with ledger.session.connection.transaction():
        ledger.session.connection.execute(
            f"SELECT FROM {ledger.database.schema}.pgqrs_workflow_steps FOR UPDATE".encode()
        )
        late = ledger.in_thread(lambda: ledger.ask("a", token=token, session=other))
        wait_until_blocked(look, other, ledger.session, late)
        assert runs.cancel(look, workflow_id)
        assert steps.cancel_batch(look, workflow_id, batch=10) == []
        assert steps.unfinished(look, workflow_id) == 1
    assert late.result(30).verdict == "EXECUTE"
    assert [t for t, _ in steps.cancel_batch(look, workflow_id, batch=10)] == ["a"]
    assert steps.unfinished(look, workflow_id) == 0
    assert not ledger.succeed("a", token)


def test_cancel_never_waits_for_a_step(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    token = ledger.acquire("a")
    other = ledger.connect()
    other.connection.execute("SET lock_timeout = '1ms'")
    with ledger.session.connection.transaction():
        assert ledger.succeed("a", token)
        assert runs.cancel(other, workflow_id)
        assert [t for t, _ in steps.cancel_batch(other, workflow_id, batch=10)] == ["b"]
    assert (ledger.row("a").status, ledger.run_status(workflow_id)) == ("SUCCESS", "CANCELLED")


def test_a_run_that_closes_while_it_is_cancelled_is_either_and_not_both(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed_and_hand_off("a")
    look, other = ledger.connect(), ledger.connect()
    closing = close_in_two(ledger.session, workflow_id)
    while next(closing) != "written":
        pass
    cancelling = ledger.in_thread(lambda: runs.cancel(other, workflow_id))
    wait_until_blocked(look, other, ledger.session, cancelling)
    assert list(closing)[-1] == "SUCCESS"
    assert not cancelling.result(30)
    assert ledger.run_status(workflow_id) == "SUCCESS"


# --- pause


def test_a_step_that_finds_its_run_paused_while_it_is_continued_is_not_forgotten(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.pause(ledger.session, workflow_id)
    look, other = ledger.connect(), ledger.connect()

    def ask_and_park() -> tuple[str, bool]:
        verdict = ledger.ask("a", session=other).verdict
        return verdict, ledger.park("a", workflow_id, other)

    with ledger.session.connection.transaction():
        # Somebody has the step's row: the acquire has looked at the run, and waits.
        ledger.session.connection.execute(
            f"SELECT FROM {ledger.database.schema}.pgqrs_workflow_steps FOR UPDATE".encode()
        )
        late = ledger.in_thread(ask_and_park)
        wait_until_blocked(look, other, ledger.session, late)
        with look.connection.transaction():
            assert runs.unpause(look, workflow_id)
    assert late.result(30) == ("PAUSED", False)
    assert ledger.row("a").due is not None
    assert ledger.ask("a").verdict == "EXECUTE"


def test_a_step_that_is_parked_while_its_run_is_continued_is_woken(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "PAUSED"
    look, other = ledger.connect(), ledger.connect()

    def unpause() -> bool:
        with other.connection.transaction():
            return runs.unpause(other, workflow_id)

    with ledger.session.connection.transaction():
        assert ledger.park("a", workflow_id)
        late = ledger.in_thread(unpause)
        wait_until_blocked(look, other, ledger.session, late)
    assert late.result(30)
    assert ledger.row("a").due == 0.0


def test_touch_does_not_wait_for_whoever_writes_the_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    other = ledger.connect()
    other.connection.execute("SET lock_timeout = '1ms'")
    with ledger.session.connection.transaction():
        runs.pause(ledger.session, workflow_id)
        runs.touch(other, workflow_id)
    assert ledger.run_status(workflow_id) == "QUEUED"


# --- workers


def test_of_two_judges_one_declares_a_worker_dead(ledger: Ledger) -> None:
    key = workers.lock_key(uuid4())
    other = ledger.connect()
    with ledger.session.connection.transaction():
        assert workers.try_lock(ledger.session, key)
        with other.connection.transaction():
            assert not workers.try_lock(other, key)
    with other.connection.transaction():
        assert workers.try_lock(other, key)


def test_a_worker_that_comes_back_during_its_judgement_may_still_finish_its_steps(ledger: Ledger) -> None:
    old, new = Worker(), Worker()
    ledger.start("a")
    token = ledger.acquire("a", old)
    look, returned = ledger.connect(), ledger.connect()

    def move() -> None:
        workers.register(returned, new.worker_id, app=ledger.app, hostname="celery@host", pid=1)
        leases.move_owner(returned, app=ledger.app, old_id=old.worker_id, new_id=new.worker_id)

    with ledger.session.connection.transaction():
        assert workers.try_lock(ledger.session, workers.lock_key(old.worker_id))
        assert ledger.expire(old) == 1
        moving = ledger.in_thread(move)
        wait_until_blocked(look, returned, ledger.session, moving)
    moving.result(30)
    assert (ledger.row("a").status, ledger.row("a").worker_id) == ("QUEUED", None)
    assert ledger.succeed("a", token)
    assert ledger.row("a").status == "SUCCESS"


def test_a_worker_whose_session_lives_cannot_be_declared_dead(ledger: Ledger) -> None:
    worker = Worker()
    alive = ledger.connect()
    workers.register(alive, worker.worker_id, app=ledger.app, hostname="celery@host", pid=1)
    with ledger.session.connection.transaction():
        assert not workers.try_lock(ledger.session, workers.lock_key(worker.worker_id))


# --- random


def test_owners_whose_leases_end_at_once_commit_each_step_once(live_ledger: Ledger) -> None:
    """Three owners and a relay fight over 100 steps; every lease is over as soon as it is given."""
    ledger = live_ledger
    names = [f"t{n}" for n in range(100)]
    for name in names:
        ledger.start(name)
    commits: list[str] = []
    takeovers: list[str] = []
    stop = threading.Event()
    barrier = threading.Barrier(3, timeout=60)

    def owner(session: Session) -> None:
        for name in names:
            token = uuid4()
            barrier.wait()
            asked = ledger.ask(name, token=token, session=session, lease=0, max_lost=10_000)
            if asked.verdict == "EXECUTE":
                takeovers.append(name)
                if ledger.succeed(name, token, session=session):
                    commits.append(name)

    def relay(session: Session) -> None:
        while not stop.is_set():
            ledger.claim(session=session, interval=0, max_lost=10_000)

    relaying = in_session(ledger, relay)
    owners = [in_session(ledger, owner) for _ in range(3)]
    for future in owners:
        future.result(60)
    stop.set()
    relaying.result(60)
    assert len(takeovers) > len(names), "nobody was ever overtaken"
    assert sorted(commits) == sorted(names)


def in_session(ledger: Ledger, work: Callable[[Session], None]) -> Any:
    session = ledger.connect()
    return ledger.in_thread(lambda: work(session))
