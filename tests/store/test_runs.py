"""Runs: closing by looking, cancel, resume, pause, and the relay's backstop."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from pgqrs_celery.exceptions import RunNotFound, RunStateError
from pgqrs_celery.store import recording, runs, steps
from pgqrs_celery.store.runs import NewRun
from tests.support.ledger import ERROR, INTERVAL, LEASE, MESSAGE, Ledger, Worker


def resume(ledger: Ledger, workflow_id: int) -> list[str]:
    with ledger.session.connection.transaction():
        return sorted(task_id for task_id, _, _ in runs.resume(ledger.session, workflow_id)[0])


def status(ledger: Ledger, workflow_id: int) -> tuple[str, str | None, str | None]:
    found = ledger.execute(
        "SELECT status, output, error FROM {schema}.pgqrs_workflows WHERE workflow_id = %s", [workflow_id]
    )
    return found[0][0], found[0][1], found[0][2]


def test_a_run_closes_when_its_last_step_is_handed_off_and_not_before(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    assert ledger.close_if_quiet(workflow_id) is None
    ledger.succeed_and_hand_off("a")
    assert ledger.close_if_quiet(workflow_id) is None
    token = ledger.acquire("b")
    assert ledger.close_if_quiet(workflow_id) is None
    ledger.succeed("b", token)
    assert ledger.close_if_quiet(workflow_id) is None
    ledger.hand_off("b")
    assert ledger.close_if_quiet(workflow_id) == "SUCCESS"
    assert ledger.close_if_quiet(workflow_id) is None


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (("SUCCESS", "SUCCESS"), "SUCCESS"),
        (("SUCCESS", "FAILED"), "FAILED"),
        (("FAILED", "SUCCESS"), "FAILED"),
        (("FAILED", "CANCELLED"), "FAILED"),
        (("CANCELLED", "SUCCESS"), "CANCELLED"),
        (("BROKEN", "SUCCESS"), "FAILED"),
    ],
)
def test_the_verdict_is_that_of_the_worst_step(ledger: Ledger, outcomes: tuple[str, str], verdict: str) -> None:
    workflow_id = ledger.start("a", "b")
    for task_id, outcome in zip(("a", "b"), outcomes, strict=True):
        if outcome == "SUCCESS":
            ledger.succeed_and_hand_off(task_id)
        elif outcome == "FAILED":
            ledger.fail_and_hand_off(task_id)
        elif outcome == "CANCELLED":
            steps.drop(ledger.session, task_id, lease_token=ledger.acquire(task_id), error="{}")
        else:
            ledger.succeed(task_id, ledger.acquire(task_id))
            ledger.break_hand_off(task_id)
            ledger.give_up_hand_off(task_id)
    assert ledger.close_if_quiet(workflow_id) == verdict


def test_a_function_s_caught_step_error_does_not_fail_its_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.execute(
        "INSERT INTO {schema}.pgqrs_workflow_steps (workflow_id, step_id, app, task_name, kind, status, open, error) "
        "VALUES (%s, 'fetch', 'shop', 'fetch', 'inner', 'FAILED', false, '{{}}')",
        [workflow_id],
    )
    ledger.finish("a")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_a_failed_run_names_the_step_that_failed_first(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b", "c")
    ledger.succeed_and_hand_off("a")
    ledger.fail_and_hand_off("c")
    ledger.advance(1)
    ledger.fail_and_hand_off("b")
    ledger.close_if_quiet(workflow_id)
    error = json.loads(status(ledger, workflow_id)[2] or "null")
    assert error == {"step_id": "c", "task_id": "c", "hand_off": False, "error": json.loads(ERROR)}


def test_a_successful_run_s_output_is_that_of_its_last_task(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b", result='[["b", null], null]')
    ledger.succeed_and_hand_off("b", '{"x": 1e16}')
    ledger.advance(1)
    ledger.succeed_and_hand_off("a", "1")
    ledger.close_if_quiet(workflow_id)
    assert status(ledger, workflow_id) == ("SUCCESS", '{"x": 1e16}', None)


def test_a_closed_run_has_a_beginning_and_an_end(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.advance(5)
    ledger.finish("a")
    found = ledger.execute(
        "SELECT created_at < completed_at, completed_at = %s, started_at IS NOT NULL FROM {schema}.pgqrs_workflows "
        "WHERE workflow_id = %s",
        [ledger.now, workflow_id],
    )
    assert found == [(True, True, True)]


# --- cancel


def test_cancel_ends_what_has_not_finished_and_spares_what_has(ledger: Ledger) -> None:
    workflow_id = ledger.start("queued", "running", "succeeded", "failed")
    token = ledger.acquire("running", Worker())
    ledger.succeed("succeeded", ledger.acquire("succeeded"), "1")
    ledger.fail("failed", ledger.acquire("failed"))
    assert runs.cancel(ledger.session, workflow_id)
    cancelled = dict(steps.cancel_batch(ledger.session, workflow_id, batch=10))
    assert cancelled == {"queued": MESSAGE, "running": MESSAGE}
    for task_id in cancelled:
        row = ledger.row(task_id)
        assert (row.status, row.open, row.due, row.lease_token) == ("CANCELLED", True, 0.0, None)
    assert not ledger.succeed("running", token)
    assert (ledger.row("succeeded").status, ledger.row("failed").status) == ("SUCCESS", "FAILED")
    assert steps.unfinished(ledger.session, workflow_id) == 0


def test_a_cancelled_run_stays_cancelled_when_its_last_step_is_handed_off(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    ledger.succeed("a", ledger.acquire("a"))
    ledger.acquire("b")
    runs.cancel(ledger.session, workflow_id)
    steps.cancel_batch(ledger.session, workflow_id, batch=10)
    for task_id in ("a", "b"):
        assert ledger.hand_off(task_id) == workflow_id
        assert ledger.close_if_quiet(workflow_id) is None
    assert ledger.run_status(workflow_id) == "CANCELLED"


def test_cancel_goes_on_in_batches_until_nothing_is_left(ledger: Ledger) -> None:
    workflow_id = ledger.start(*(f"t{n}" for n in range(7)))
    runs.cancel(ledger.session, workflow_id)
    sizes = []
    while batch := steps.cancel_batch(ledger.session, workflow_id, batch=3):
        sizes.append(len(batch))
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("ended", ["SUCCESS", "FAILED"])
def test_a_run_that_has_ended_cannot_be_cancelled_or_paused(ledger: Ledger, ended: str) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed_and_hand_off("a") if ended == "SUCCESS" else ledger.fail_and_hand_off("a")
    ledger.close_if_quiet(workflow_id)
    assert not runs.cancel(ledger.session, workflow_id)
    assert not runs.pause(ledger.session, workflow_id)
    assert ledger.run_status(workflow_id) == ended


def test_a_cancel_that_died_half_way_may_be_said_again(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    assert runs.cancel(ledger.session, workflow_id)
    assert runs.cancel(ledger.session, workflow_id)
    assert steps.unfinished(ledger.session, workflow_id) == 1


def test_the_run_of_another_is_not_touched(ledger: Ledger) -> None:
    mine, other = ledger.start("a"), ledger.start("b")
    runs.cancel(ledger.session, mine)
    steps.cancel_batch(ledger.session, mine, batch=10)
    assert (ledger.run_status(other), ledger.row("b").status) == ("QUEUED", "QUEUED")


# --- resume


def test_resume_queues_what_failed_and_nothing_else(ledger: Ledger) -> None:
    workflow_id = ledger.start("ok", "bad", "poisoned")
    ledger.succeed_and_hand_off("ok", "1")
    ledger.fail_and_hand_off("bad")
    ledger.fail_and_hand_off("poisoned")
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET lost = 3, handoffs = 4 WHERE task_id = 'poisoned'")
    assert ledger.close_if_quiet(workflow_id) == "FAILED"
    succeeded = ledger.row("ok")
    fence = ledger.row("bad").fence
    assert resume(ledger, workflow_id) == ["bad", "poisoned"]
    assert ledger.row("ok") == succeeded
    assert status(ledger, workflow_id) == ("RUNNING", None, None)
    for task_id in ("bad", "poisoned"):
        row = ledger.row(task_id)
        assert (row.status, row.open, row.due, row.sent, row.error) == ("QUEUED", True, 0.0, False, None)
        assert (row.lost, row.handoffs, row.fence, row.generation, row.message) == (0, 0, fence + 1, 0, MESSAGE)
    assert sorted(step.task_id for step in ledger.claim()) == ["bad", "poisoned"]
    ledger.finish("bad")
    ledger.finish("poisoned")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_who_was_about_to_hand_off_a_failure_hands_off_nothing_after_a_resume(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.fail("a", ledger.acquire("a"))
    stalled = ledger.row("a").fence
    ledger.hand_off("a")  # by a relay
    assert ledger.close_if_quiet(workflow_id) == "FAILED"
    resume(ledger, workflow_id)
    again = ledger.acquire("a")
    for step_is in ("running", "succeeded"):
        if step_is == "succeeded":
            assert ledger.succeed("a", again)
        before = ledger.row("a")
        assert steps.hand_off(ledger.session, "a", fence=stalled) is None
        assert ledger.row("a") == before, step_is
        assert ledger.close_if_quiet(workflow_id) is None, "what follows from the success is not recorded yet"
    assert ledger.hand_off("a") == workflow_id


def test_who_was_about_to_give_up_a_hand_off_gives_up_none_after_a_resume(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed("a", ledger.acquire("a"), "5")
    stalled = ledger.row("a").fence
    ledger.break_hand_off("a")
    ledger.give_up_hand_off("a")
    assert ledger.close_if_quiet(workflow_id) == "FAILED"
    resume(ledger, workflow_id)
    before = ledger.row("a")
    assert steps.hand_off_failed(ledger.session, "a", fence=stalled, error=ERROR, interval=INTERVAL) is None
    assert steps.give_up_hand_off(ledger.session, "a", fence=stalled) is None
    assert steps.hand_off(ledger.session, "a", fence=stalled) is None
    assert ledger.row("a") == before


def test_resume_keeps_the_generation_so_that_old_messages_stay_old(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    ledger.record(workflow_id, ledger.step("a", generation=3), lease_token=token)
    ledger.fail("a", ledger.acquire("a", generation=3))
    ledger.hand_off("a")
    ledger.close_if_quiet(workflow_id)
    resume(ledger, workflow_id)
    assert ledger.row("a").generation == 3
    assert ledger.ask("a", generation=0).verdict == "STALE"
    assert ledger.ask("a", generation=3).verdict == "EXECUTE"


def test_resume_repeats_a_hand_off_that_was_given_up_without_running_the_step(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed("a", ledger.acquire("a"), "5")
    ledger.break_hand_off("a")
    ledger.give_up_hand_off("a")
    assert ledger.close_if_quiet(workflow_id) == "FAILED"
    assert resume(ledger, workflow_id) == ["a"]
    row = ledger.row("a")
    assert (row.status, row.open, row.output, row.error, row.handoffs) == ("SUCCESS", True, "5", None, 0)
    got = ledger.ask("a")
    assert (got.verdict, got.output) == ("REPLAY", "5")
    ledger.hand_off("a")
    assert ledger.close_if_quiet(workflow_id) == "SUCCESS"


def test_a_zombie_of_before_the_resume_is_no_owner(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    ledger.fail("a", token)
    ledger.hand_off("a")
    ledger.close_if_quiet(workflow_id)
    resume(ledger, workflow_id)
    before = ledger.row("a")
    assert not ledger.succeed("a", token)
    assert not ledger.fail("a", token)
    assert ledger.row("a") == before


@pytest.mark.parametrize("state", ["QUEUED", "SUCCESS", "CANCELLED"])
def test_only_a_failed_run_can_be_resumed(ledger: Ledger, state: str) -> None:
    workflow_id = ledger.start("a")
    if state == "SUCCESS":
        ledger.finish("a")
    elif state == "CANCELLED":
        runs.cancel(ledger.session, workflow_id)
    with pytest.raises(RunStateError, match=f"run {workflow_id} is {state}; only a FAILED run"):
        resume(ledger, workflow_id)
    assert ledger.run_status(workflow_id) == state


def test_a_run_that_does_not_exist_cannot_be_resumed(ledger: Ledger) -> None:
    with pytest.raises(RunNotFound, match="run 4711"):
        resume(ledger, 4711)


def test_a_failed_run_without_anything_to_send_says_so_and_stays_failed(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.fail_and_hand_off("a")
    ledger.close_if_quiet(workflow_id)
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET message = NULL")
    with pytest.raises(RunStateError, match="none of its steps can be sent again"):
        resume(ledger, workflow_id)
    assert ledger.run_status(workflow_id) == "FAILED"


# --- pause


def test_pause_and_unpause_are_idempotent(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    assert runs.pause(ledger.session, workflow_id)
    assert runs.pause(ledger.session, workflow_id)
    with ledger.session.connection.transaction():
        assert runs.unpause(ledger.session, workflow_id)
        assert not runs.unpause(ledger.session, workflow_id)


def test_unpause_wakes_what_was_parked_and_not_what_waits_for_a_message(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    recording.await_link(ledger.session, ledger.step("b"), workflow_id=workflow_id, app=ledger.app)
    runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "PAUSED"
    assert ledger.park("a", workflow_id)
    with ledger.session.connection.transaction():
        runs.unpause(ledger.session, workflow_id)
    assert (ledger.row("a").due, ledger.row("b").due) == (0.0, None)


def test_a_paused_run_can_be_cancelled(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "PAUSED"
    assert ledger.park("a", workflow_id)
    assert runs.cancel(ledger.session, workflow_id)
    assert len(steps.cancel_batch(ledger.session, workflow_id, batch=10)) == 1
    assert [step.status for step in ledger.claim()] == ["CANCELLED"]


# --- the backstop


def stuck(ledger: Ledger, after: int = 0, batch: int = 100) -> tuple[list[int], int | None]:
    return runs.stuck(ledger.session, app=ledger.app, after=after, age=2.0, batch=batch)


def test_a_run_whose_last_worker_died_before_its_look_is_found(ledger: Ledger) -> None:
    quiet, busy = ledger.start("a"), ledger.start("b")
    ledger.succeed_and_hand_off("a")
    ledger.advance(1.9)
    assert stuck(ledger) == ([], None)
    ledger.advance(0.2)
    assert stuck(ledger) == ([quiet], None)
    assert ledger.close_if_quiet(quiet) == "SUCCESS"
    assert stuck(ledger) == ([], None)
    assert ledger.run_status(busy) == "QUEUED"


def test_the_backstop_goes_round_in_bounded_batches_and_keeps_to_its_app(ledger: Ledger) -> None:
    ids = [ledger.start(f"t{n}") for n in range(5)]
    ledger.start("foreign", app="bank")
    for n in (1, 4):
        ledger.succeed_and_hand_off(f"t{n}")
    ledger.advance(3)
    first, last = stuck(ledger, batch=3)
    assert (first, last) == ([ids[1]], ids[2])
    assert stuck(ledger, after=ids[2], batch=3) == ([ids[4]], None)


def test_a_run_that_waits_for_an_awaited_link_is_not_stuck(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    recording.await_link(ledger.session, ledger.step("b"), workflow_id=workflow_id, app=ledger.app)
    ledger.succeed_and_hand_off("a")
    ledger.advance(100)
    assert stuck(ledger) == ([], None)
    assert ledger.close_if_quiet(workflow_id) is None


def test_touch_leaves_a_closed_run_alone(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.finish("a")
    runs.touch(ledger.session, workflow_id)
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_begin_does_not_revive_a_cancelled_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.cancel(ledger.session, workflow_id)
    with ledger.session.connection.transaction():
        runs.begin(ledger.session, workflow_id)
    assert ledger.run_status(workflow_id) == "CANCELLED"


def test_the_plan_of_a_run_is_kept_verbatim(ledger: Ledger) -> None:
    run = NewRun(ledger.app, "r", "long", plan='{"a":  [1e16]}')
    started = runs.start(ledger.session, run, [ledger.step("a")])
    assert started is not None
    assert runs.plan(ledger.session, started[0]) == '{"a":  [1e16]}'
    assert runs.plan(ledger.session, 4711) is None


def test_a_late_step_of_a_run_may_still_be_replayed_after_its_end(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.finish("a")
    assert ledger.ask("a", token=uuid4()).verdict == "DONE"
    assert ledger.run_status(workflow_id) == "SUCCESS"
    assert ledger.row("a").due is None
    ledger.advance(LEASE)
    assert ledger.claim() == []
