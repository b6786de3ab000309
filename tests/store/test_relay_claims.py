"""claim_due, next_due, resent, unsent: what is due, to whom, and what taking it changes."""

from __future__ import annotations

import pytest

from pgqrs_celery.store import clock, runs, steps
from pgqrs_celery.store.runs import NewRun
from tests.support.ledger import INTERVAL, INTERVAL_MAX, LEASE, MESSAGE, Ledger, Worker


def next_due(ledger: Ledger, app: str | None = None, may_judge: bool = True) -> float | None:
    return clock.next_due(ledger.session, app=app or ledger.app, may_judge=may_judge)


def test_nothing_is_due_in_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.claim() == []
    assert next_due(ledger) is None


def test_the_next_due_time_is_in_seconds(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.advance(4)
    assert next_due(ledger) == INTERVAL - 4
    ledger.advance(INTERVAL)
    assert next_due(ledger) == -4


def test_what_is_claimed_is_not_due_for_anybody_else(ledger: Ledger) -> None:
    ledger.start("a", "b")
    ledger.advance(INTERVAL)
    assert sorted(step.task_id for step in ledger.claim()) == ["a", "b"]
    assert ledger.claim() == []


def test_the_longest_due_comes_first_and_a_batch_is_bounded(ledger: Ledger) -> None:
    for n in range(5):
        ledger.start(f"t{n}")
        ledger.advance(1)
    ledger.advance(INTERVAL)
    assert sorted(step.task_id for step in ledger.claim(batch=2)) == ["t0", "t1"]
    assert sorted(step.task_id for step in ledger.claim(batch=2)) == ["t2", "t3"]
    assert sorted(step.task_id for step in ledger.claim(batch=2)) == ["t4"]


def test_a_claim_brings_what_is_needed_to_send_it(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.advance(INTERVAL)
    (step,) = ledger.claim()
    assert (step.workflow_id, step.task_id, step.task_name, step.queue) == (workflow_id, "a", "shop.pack", "celery")
    assert (step.message, step.generation, step.was, step.status) == (MESSAGE, 0, "QUEUED", "QUEUED")
    assert step.sent_at is not None
    assert ledger.now is not None


def test_a_published_step_is_looked_at_ever_less_often(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.advance(INTERVAL)
    waits = []
    for look in range(1, 11):
        (step,) = ledger.claim()
        assert step.looks == look
        assert step.sent_at is not None
        due = next_due(ledger)
        assert due is not None
        waits.append(due)
        ledger.advance(due)
    assert waits == [20.0, 40.0, 80.0, 160.0, 320.0] + [INTERVAL_MAX] * 5


def test_a_held_step_is_published_when_its_time_comes_and_looked_at_afresh(ledger: Ledger) -> None:
    run = NewRun(ledger.app, "a", "pack")
    runs.start(ledger.session, run, [ledger.step("a", delay=50.0, sent=False)])
    ledger.advance(50)
    (step,) = ledger.claim()
    assert (step.was, step.sent_at, step.looks) == ("QUEUED", None, 0)
    assert step.now == ledger.now
    row = ledger.row("a")
    assert (row.sent, row.due, row.looks) == (True, INTERVAL, 0)


def test_an_expired_running_step_is_queued_again_and_counted(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    (step,) = ledger.claim()
    assert (step.was, step.status, step.lost) == ("RUNNING", "QUEUED", 1)
    row = ledger.row("a")
    assert (row.status, row.worker_id, row.due, row.sent) == ("QUEUED", None, INTERVAL, True)
    assert row.lease_token == token, "a slow owner may still finish"


def test_a_step_is_not_judged_while_its_lease_lives(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.acquire("a", Worker())
    ledger.advance(LEASE - 0.001)
    assert ledger.claim() == []


def test_who_may_not_judge_yet_takes_everything_but_running_steps(ledger: Ledger) -> None:
    ledger.start("running", "queued", "finished", "cancelled")
    ledger.acquire("running", Worker())
    ledger.succeed("finished", ledger.acquire("finished", Worker()))
    steps.revoke(ledger.session, "cancelled", error="{}", lease=LEASE, generation=0)
    ledger.advance(LEASE + 1)
    assert sorted(step.task_id for step in ledger.claim(may_judge=False)) == ["cancelled", "finished", "queued"]
    assert next_due(ledger, may_judge=False) == INTERVAL
    assert next_due(ledger, may_judge=True) == -1.0
    assert [step.task_id for step in ledger.claim(may_judge=True)] == ["running"]


@pytest.mark.parametrize("status", ["SUCCESS", "FAILED", "CANCELLED"])
def test_a_hand_off_that_was_cut_short_is_due_and_counted(ledger: Ledger, status: str) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    if status == "SUCCESS":
        ledger.succeed("a", token)
    elif status == "FAILED":
        ledger.fail("a", token)
    else:
        steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0, lease_token=token)
    ledger.advance(LEASE + 1)
    for tries in (1, 2):
        (step,) = ledger.claim()
        assert (step.was, step.status, step.handoffs, step.lost) == (status, status, tries, 0)
        assert ledger.row("a").lease_token is None
        ledger.advance(INTERVAL)
    ledger.hand_off("a")
    assert ledger.claim() == []
    assert next_due(ledger) is None


def test_a_parked_step_is_queued_when_its_time_is_over(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET status = 'PAUSED', due_at = {schema}.pgqrs_now() + interval '1 hour'"
    )
    ledger.advance(3599)
    assert ledger.claim() == []
    ledger.advance(1)
    (step,) = ledger.claim()
    assert (step.was, step.status) == ("PAUSED", "QUEUED")
    assert ledger.ask("a").verdict == "EXECUTE"


def test_two_apps_in_one_schema_do_not_take_each_other_s_work(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.start("b", app="bank")
    ledger.advance(INTERVAL)
    assert [step.task_id for step in ledger.claim()] == ["a"]
    assert next_due(ledger, "bank") == 0.0
    assert [step.task_id for step in ledger.claim(app="bank")] == ["b"]


def test_what_the_broker_did_not_take_is_due_soon_as_never_published(ledger: Ledger) -> None:
    ledger.start("a", "b")
    ledger.acquire("b")
    before = ledger.row("b")
    clock.unsent(ledger.session, ["a", "b"], interval=1.5)
    row = ledger.row("a")
    assert (row.due, row.sent) == (1.5, False)
    assert ledger.row("b") == before, "the message came through after all"


def test_what_is_sent_again_has_a_new_send_time(ledger: Ledger) -> None:
    ledger.start("a", "b")
    ledger.acquire("b")
    ledger.advance(100)
    clock.resent(ledger.session, ["a", "b"])
    found = ledger.execute("SELECT task_id, sent_at FROM {schema}.pgqrs_workflow_steps ORDER BY task_id")
    assert [at == ledger.now for _, at in found] == [True, False]


def test_a_cancelled_step_stays_due_until_somebody_has_announced_it(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.cancel(ledger.session, workflow_id)
    assert steps.cancel_batch(ledger.session, workflow_id, batch=10) == [("a", MESSAGE)]
    (step,) = ledger.claim()
    assert (step.status, step.message) == ("CANCELLED", MESSAGE)
    ledger.advance(INTERVAL)
    assert len(ledger.claim()) == 1
    assert ledger.hand_off("a") == workflow_id
    ledger.advance(10_000)
    assert ledger.claim() == []


def test_a_bounded_look_leaves_out_what_has_been_due_for_longer(ledger: Ledger) -> None:
    ledger.start("old")
    ledger.advance(4)
    ledger.start("new")
    ledger.advance(INTERVAL)
    assert clock.next_due(ledger.session, app=ledger.app, may_judge=True, back=3.0) == 0.0
    assert [step.task_id for step in ledger.claim(back=3.0)] == ["new"]
    assert next_due(ledger) == -4.0
    assert [step.task_id for step in ledger.claim()] == ["old"]
