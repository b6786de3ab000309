"""acquire: who may execute a step, row by row of the transition table."""

from __future__ import annotations

from uuid import uuid4

import pytest

from pgqrs_celery.store import runs, steps
from tests.support.ledger import ERROR, INTERVAL, LEASE, MAX_LOST, POISON, Ledger, Worker


def lose(ledger: Ledger, task_id: str) -> None:
    """A worker takes the step and its lease ends."""
    ledger.acquire(task_id, Worker())
    ledger.advance(LEASE + 1)


def test_a_step_nobody_recorded_is_not_there(ledger: Ledger) -> None:
    found = steps.acquire(
        ledger.session,
        "nobody",
        generation=0,
        lease_token=uuid4(),
        worker_id=None,
        lease=LEASE,
        max_lost=MAX_LOST,
        poison=POISON,
        may_judge=True,
    )
    assert found is None


def test_a_queued_step_is_taken_under_a_lease_a_fence_and_a_token(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    worker, token = Worker(), uuid4()
    got = ledger.ask("a", token=token, worker=worker)
    assert (got.verdict, got.fence, got.attempt, got.lost) == ("EXECUTE", 1, 1, 0)
    assert (got.workflow_id, got.step_id, got.workflow_name, got.root_id) == (workflow_id, "a", "pack", "a")
    row = ledger.row("a")
    assert (row.status, row.lease_token, row.worker_id, row.due) == ("RUNNING", token, worker.worker_id, LEASE)
    assert (row.fence, row.attempt, row.lost) == (1, 1, 0)


def test_the_first_step_to_begin_says_that_the_run_is_to_be_touched(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b", "c")
    assert ledger.ask("a").touch
    runs.touch(ledger.session, workflow_id)
    assert ledger.run_status(workflow_id) == "RUNNING"
    assert not ledger.ask("b").touch
    ledger.advance(61)
    assert ledger.ask("c").touch


def test_a_running_step_is_held_while_its_lease_lives(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.acquire("a", Worker())
    ledger.advance(LEASE - 1)
    before = ledger.row("a")
    assert ledger.ask("a", worker=Worker()).verdict == "HELD"
    assert ledger.row("a") == before


def test_an_expired_step_is_taken_over_with_a_new_fence_and_token(ledger: Ledger) -> None:
    ledger.start("a")
    first = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    worker, second = Worker(), uuid4()
    got = ledger.ask("a", token=second, worker=worker)
    assert (got.verdict, got.fence, got.attempt, got.lost) == ("EXECUTE", 2, 2, 1)
    row = ledger.row("a")
    assert (row.lease_token, row.worker_id, row.due) == (second, worker.worker_id, LEASE)
    assert first != second


def test_an_expired_step_is_held_by_a_worker_that_may_not_judge_yet(ledger: Ledger) -> None:
    ledger.start("a")
    lose(ledger, "a")
    before = ledger.row("a")
    assert ledger.ask("a", may_judge=False).verdict == "HELD"
    assert ledger.row("a") == before
    assert ledger.ask("a", may_judge=True).verdict == "EXECUTE"


def test_asking_again_with_the_same_token_is_the_same_answer(ledger: Ledger) -> None:
    ledger.start("a")
    worker, token = Worker(), uuid4()
    assert ledger.ask("a", token=token, worker=worker).verdict == "EXECUTE"
    again = ledger.ask("a", token=token, worker=worker)
    assert (again.verdict, again.attempt, again.lost) == ("EXECUTE", 1, 0)
    assert ledger.ask("a", worker=worker).verdict == "HELD"
    assert ledger.succeed("a", token)


@pytest.mark.parametrize("by", ["relay", "acquire"])
def test_a_step_that_keeps_killing_its_workers_is_failed_and_due(ledger: Ledger, by: str) -> None:
    ledger.start("a")
    for _ in range(MAX_LOST - 1):
        lose(ledger, "a")
        if by == "relay":
            assert [step.status for step in ledger.claim()] == ["QUEUED"]
    lose(ledger, "a")
    if by == "relay":
        assert [(step.was, step.status) for step in ledger.claim()] == [("RUNNING", "FAILED")]
    else:
        token = uuid4()
        got = ledger.ask("a", token=token)
        assert (got.verdict, got.error) == ("POISONED", POISON)
        assert ledger.row("a").lease_token == token
    row = ledger.row("a")
    assert (row.status, row.open, row.lost, row.error) == ("FAILED", True, MAX_LOST, POISON)
    assert row.due == (INTERVAL if by == "relay" else LEASE)


def test_retries_do_not_count_as_lost_workers(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    for n in range(MAX_LOST + 2):
        token = ledger.acquire("a", Worker(), generation=n)
        assert ledger.record(workflow_id, ledger.step("a", generation=n + 1), lease_token=token) == "SEND"
    row = ledger.row("a")
    assert (row.status, row.lost, row.attempt) == ("QUEUED", 0, MAX_LOST + 2)


def test_a_newer_message_than_the_row_brings_its_generation_along(ledger: Ledger) -> None:
    ledger.start("a")
    assert ledger.ask("a", generation=2).verdict == "EXECUTE"
    assert ledger.row("a").generation == 2
    assert ledger.ask("a", generation=1).verdict == "STALE"


@pytest.mark.parametrize("failed", [False, True])
def test_a_finished_step_is_left_to_its_owner_while_his_lease_lives(ledger: Ledger, failed: bool) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    assert ledger.fail("a", token) if failed else ledger.succeed("a", token, "7")
    before = ledger.row("a")
    assert ledger.ask("a", worker=Worker()).verdict == "HELD"
    assert ledger.row("a") == before


@pytest.mark.parametrize("failed", [False, True])
def test_a_finished_step_whose_hand_off_was_cut_short_is_replayed(ledger: Ledger, failed: bool) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    assert ledger.fail("a", token) if failed else ledger.succeed("a", token, "7")
    ledger.advance(LEASE + 1)
    newer = uuid4()
    got = ledger.ask("a", token=newer, worker=Worker())
    assert (got.verdict, got.status) == ("REPLAY", "FAILED" if failed else "SUCCESS")
    assert (got.output, got.error) == ((None, ERROR) if failed else ("7", None))
    row = ledger.row("a")
    assert (row.status, row.open, row.attempt, row.fence) == (got.status, True, 1, 1)
    assert (row.lease_token, row.due) == (newer, LEASE)
    assert ledger.ask("a").verdict == "HELD"


def test_what_the_relay_sends_of_a_finished_step_is_replayed_at_once(ledger: Ledger) -> None:
    ledger.start("a")
    assert ledger.succeed("a", ledger.acquire("a", Worker()))
    ledger.advance(LEASE + 1)
    assert [(step.was, step.handoffs) for step in ledger.claim()] == [("SUCCESS", 1)]
    assert ledger.ask("a").verdict == "REPLAY"


@pytest.mark.parametrize("status", ["SUCCESS", "FAILED", "CANCELLED"])
def test_a_step_that_is_handed_off_is_done(ledger: Ledger, status: str) -> None:
    ledger.start("a", "keep-open")
    token = ledger.acquire("a")
    if status == "SUCCESS":
        ledger.succeed("a", token)
    elif status == "FAILED":
        ledger.fail("a", token)
    else:
        steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0, lease_token=token)
    assert ledger.hand_off("a") is not None
    before = ledger.row("a")
    for generation in (0, 1):
        ledger.advance(10_000)
        assert ledger.ask("a", generation=generation).verdict == "DONE"
    assert ledger.row("a") == before


@pytest.mark.parametrize("running", [False, True])
def test_a_step_of_a_cancelled_run_is_cancelled_and_to_be_announced(ledger: Ledger, running: bool) -> None:
    workflow_id = ledger.start("a")
    if running:
        ledger.acquire("a", Worker())
        ledger.advance(LEASE + 1)
    runs.cancel(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "CANCELLED"
    row = ledger.row("a")
    assert (row.status, row.open, row.lease_token, row.due) == ("CANCELLED", True, None, LEASE)
    assert ledger.ask("a").verdict == "CANCELLED"
    ledger.hand_off("a")
    assert ledger.ask("a").verdict == "DONE"


def test_a_success_in_a_cancelled_run_is_still_handed_off(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    assert ledger.succeed("a", ledger.acquire("a"))
    runs.cancel(ledger.session, workflow_id)
    ledger.advance(LEASE + 1)
    assert ledger.ask("a").verdict == "REPLAY"
    assert ledger.hand_off("a") == workflow_id


def test_a_step_of_a_paused_run_is_parked_until_the_run_goes_on(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    assert runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "PAUSED"
    assert ledger.park("a", workflow_id)
    assert ledger.row("a").due is None
    ledger.advance(100_000)
    assert ledger.claim() == []
    with ledger.session.connection.transaction():
        assert runs.unpause(ledger.session, workflow_id)
    assert [step.task_id for step in ledger.claim()] == ["a"]
    assert ledger.ask("a").verdict == "EXECUTE"


def test_only_a_queued_step_of_a_paused_run_is_parked(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    ledger.acquire("b")
    before = ledger.row("a")
    assert not ledger.park("a", workflow_id), "the run is not paused"
    runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a").verdict == "PAUSED"
    assert ledger.row("a") == before, "asking alone changes nothing"
    running = ledger.row("b")
    assert ledger.park("b", workflow_id)
    assert ledger.row("b") == running


def test_a_pause_does_not_stop_what_is_running(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    runs.pause(ledger.session, workflow_id)
    assert ledger.ask("a", token=token).verdict == "EXECUTE"
    assert ledger.ask("a").verdict == "HELD"
    assert ledger.succeed("a", token)
