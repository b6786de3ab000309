"""A step that its predecessor's owner takes himself: in the transaction that ends the one before it, or not at all."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from pgqrs_celery.store import recording, runs, steps, units
from pgqrs_celery.store.payloads import Payload
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.store.steps import Acquired
from pgqrs_celery.store.units import Finish, Taking
from tests.support.ledger import INTERVAL, LEASE, MESSAGE, Ledger, Worker

WORKER = Worker()


def begun(ledger: Ledger) -> tuple[int, UUID]:
    """Start a run whose first step runs; returns the run and the step's token."""
    workflow_id = ledger.start("a")
    token = ledger.acquire("a", WORKER)
    runs.touch(ledger.session, workflow_id)
    return workflow_id, token


def go_on(ledger: Ledger, token: UUID, taking: Taking | None = None) -> tuple[Finish, bool]:
    """End ``a`` and take ``b``."""
    return units.go_on(
        ledger.session,
        app=ledger.app,
        lease_token=token,
        output="1",
        outcome=Outcome("a", "SUCCESS", Payload('{"result": 1}', None, "application/json")),
        following=ledger.step("b"),
        taking=taking or Taking(uuid4(), WORKER.worker_id, LEASE),
        own_message_id=None,
    )


def results(ledger: Ledger) -> list[tuple[str, str]]:
    """Return the task results there are."""
    return ledger.execute("SELECT task_id, status FROM {schema}.pgqrs_task_results")  # type: ignore[return-value]


def fates(finish: Finish) -> list[str]:
    return [str(entry.outcome) for entry in finish.recorded]


def test_the_next_step_runs_under_the_lease_it_was_taken_with(ledger: Ledger) -> None:
    _, token = begun(ledger)
    taking = Taking(uuid4(), WORKER.worker_id, LEASE)
    finish, taken = go_on(ledger, token, taking)
    assert (finish.accepted, fates(finish), taken) == (True, ["SEND"], True)
    done, row = ledger.row("a"), ledger.row("b")
    assert (done.status, done.open, done.message) == ("SUCCESS", False, None)
    assert (row.status, row.lease_token, row.worker_id, row.due) == (
        "RUNNING", taking.lease_token, WORKER.worker_id, LEASE,
    )  # fmt: skip
    assert (row.attempt, row.fence, row.message, row.sent) == (1, 1, MESSAGE, True)
    assert results(ledger) == [("a", "SUCCESS")]
    assert ledger.succeed("b", taking.lease_token)


def test_a_zombie_goes_on_with_nothing(ledger: Ledger) -> None:
    workflow_id, zombie = begun(ledger)
    ledger.advance(LEASE + 1)
    owner = ledger.acquire("a", Worker())
    before = ledger.rows(workflow_id)
    finish, taken = go_on(ledger, zombie)
    assert (finish.accepted, fates(finish), taken) == (False, ["LOST"], False)
    assert ledger.rows(workflow_id) == before
    assert results(ledger) == []
    assert ledger.succeed("a", owner)


@pytest.mark.parametrize("why", ["paused", "not begun"])
def test_where_the_run_does_not_go_on_the_next_step_is_left_to_a_relay(ledger: Ledger, why: str) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a", WORKER)
    if why == "paused":
        runs.touch(ledger.session, workflow_id)
        assert runs.pause(ledger.session, workflow_id)
    finish, taken = go_on(ledger, token)
    assert (finish.accepted, fates(finish), taken) == (True, ["SEND"], False)
    row = ledger.row("b")
    assert (row.status, row.due, row.sent, row.attempt, row.lease_token) == ("QUEUED", 0.0, False, 0, None)
    assert [step.task_id for step in ledger.claim()] == ["b"]


def test_nothing_follows_in_a_cancelled_run(ledger: Ledger) -> None:
    workflow_id, token = begun(ledger)
    assert runs.cancel(ledger.session, workflow_id)
    finish, taken = go_on(ledger, token)
    assert (finish.accepted, fates(finish), taken) == (True, ["CANCELLED"], False)
    assert list(ledger.rows(workflow_id)) == ["a"]


def test_a_step_that_was_announced_before_is_left_to_a_relay(ledger: Ledger) -> None:
    workflow_id, token = begun(ledger)
    recording.await_link(ledger.session, ledger.step("b"), workflow_id=workflow_id, app=ledger.app)
    assert ledger.row("b").due is None
    finish, taken = go_on(ledger, token)
    assert (finish.accepted, fates(finish), taken) == (True, ["SEND"], False)
    row = ledger.row("b")
    assert (row.status, row.due, row.message) == ("QUEUED", 0.0, MESSAGE)


def test_a_step_that_somebody_else_has_is_left_to_him(ledger: Ledger) -> None:
    workflow_id, token = begun(ledger)
    assert ledger.record(workflow_id, "b") == "SEND"
    other = ledger.acquire("b", Worker())
    finish, taken = go_on(ledger, token)
    assert (finish.accepted, fates(finish), taken) == (True, ["SUPPRESS"], False)
    assert ledger.row("b").lease_token == other


def test_going_on_a_second_time_changes_nothing(ledger: Ledger) -> None:
    workflow_id, token = begun(ledger)
    taking = Taking(uuid4(), WORKER.worker_id, LEASE)
    assert go_on(ledger, token, taking)[1]
    before = ledger.rows(workflow_id)
    finish, taken = go_on(ledger, token, taking)
    assert (finish.accepted, taken) == (False, False)
    assert ledger.rows(workflow_id) == before
    # By this its owner knows that the answer to the first one was lost.
    assert steps.finished_as(ledger.session, "b", "RUNNING", taking.lease_token)


# --- where the result is stored elsewhere, between the success and the hand-off


def succeed(ledger: Ledger, token: UUID) -> Finish:
    """End ``a``, whose result is still to be stored, with ``b`` following."""
    return units.finish(
        ledger.session,
        app=ledger.app,
        lease_token=token,
        output="1",
        outcome=Outcome("a", "SUCCESS"),
        following=ledger.step("b"),
        hand_off=False,
    )


def succeeded(ledger: Ledger) -> tuple[int, int]:
    """Start a run whose first step has succeeded and is not handed off, with a second one; returns run and fence."""
    workflow_id, token = begun(ledger)
    finish = succeed(ledger, token)
    assert (finish.accepted, fates(finish)) == (True, ["SEND"])
    return workflow_id, ledger.row("a").fence


def pass_on(ledger: Ledger, fence: int, token: UUID | None = None) -> Acquired | None:
    """End the hand-off of ``a`` and take ``b``."""
    return steps.pass_on(
        ledger.session,
        "a",
        fence=fence,
        task_id="b",
        generation=0,
        lease_token=token or uuid4(),
        worker_id=WORKER.worker_id,
        lease=LEASE,
    )


def test_a_step_stays_open_under_its_lease_until_its_result_is_stored(ledger: Ledger) -> None:
    succeeded(ledger)
    done, following = ledger.row("a"), ledger.row("b")
    assert (done.status, done.open, done.message, done.due) == ("SUCCESS", True, MESSAGE, LEASE)
    assert (following.status, following.sent, following.due) == ("QUEUED", True, INTERVAL)
    assert results(ledger) == []
    ledger.advance(LEASE + 1)
    assert sorted(step.task_id for step in ledger.claim()) == ["a", "b"]


def test_the_next_step_is_taken_when_the_one_before_it_is_handed_off(ledger: Ledger) -> None:
    _, fence = succeeded(ledger)
    token = uuid4()
    answer = pass_on(ledger, fence, token)
    assert answer is not None
    assert (answer.verdict, answer.step_id, answer.fence, answer.attempt) == ("EXECUTE", "b", 1, 1)
    assert (ledger.row("a").open, ledger.row("a").message) == (False, None)
    row = ledger.row("b")
    assert (row.status, row.lease_token, row.worker_id, row.due) == ("RUNNING", token, WORKER.worker_id, LEASE)
    # The answer may have been lost: then it is asked for under the same token.
    assert pass_on(ledger, fence, token) is None
    assert ledger.ask("b", token=token).verdict == "EXECUTE"
    assert ledger.row("b").attempt == 1


@pytest.mark.parametrize("why", ["taken", "paused", "cancelled"])
def test_a_step_is_handed_off_also_where_the_next_one_is_not_to_be_had(ledger: Ledger, why: str) -> None:
    workflow_id, fence = succeeded(ledger)
    if why == "taken":
        ledger.acquire("b", Worker())
    elif why == "paused":
        assert runs.pause(ledger.session, workflow_id)
    else:
        assert runs.cancel(ledger.session, workflow_id)
    before = ledger.row("b")
    assert pass_on(ledger, fence) is None
    assert not ledger.row("a").open
    assert ledger.row("b") == before


def test_what_was_resumed_meanwhile_is_not_handed_off(ledger: Ledger) -> None:
    _, fence = succeeded(ledger)
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET fence = fence + 1 WHERE task_id = 'a'")
    assert pass_on(ledger, fence) is not None
    assert ledger.row("a").open


def test_a_zombie_s_success_is_not_followed_where_its_result_is_elsewhere(ledger: Ledger) -> None:
    workflow_id, zombie = begun(ledger)
    ledger.advance(LEASE + 1)
    ledger.acquire("a", Worker())
    before = ledger.rows(workflow_id)
    finish = succeed(ledger, zombie)
    assert (finish.accepted, fates(finish)) == (False, ["LOST"])
    assert ledger.rows(workflow_id) == before
