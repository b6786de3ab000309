"""Who has a message keeps its lease alive; who waits does not hold a place."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pgqrs_celery import Status
from pgqrs_celery.exceptions import PoisonedStep
from tests.support.copies import sent_messages
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

LEASE = 9.0
#: True when a running step's lease, which is renewed in every third of it, was renewed two seconds after a moment or
#: later: by then whoever has dropped it has dropped it.
RENEWED = """
SELECT FROM {}.pgqrs_workflow_steps
 WHERE task_id = %s AND status = 'RUNNING' AND due_at > %s + interval '11 seconds'
"""


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_a_duplicate_in_the_same_worker_does_not_drop_the_lease(each_scenario: Scenario) -> None:
    with Fleet(each_scenario.with_conf(pgqrs_lease=LEASE), size=1) as fleet:
        step = named(fleet.tasks.step.s([], "a"))
        with fleet.scenario.points.arm("in_body", step.id) as trap, sent_messages() as messages:
            result = step.delay()
            trap.wait()
            messages[step.id].deliver_again(fleet.application.celery)
            answer = f"step[{step.id}] is left alone: HELD"
            wait_for(lambda: fleet.logged(answer), PATIENCE, "the copy to be answered")
            ((answered,),) = each_scenario.execute("SELECT now()")
            wait_for(lambda: each_scenario.execute(RENEWED, step.id, answered), PATIENCE, "the lease to be renewed")
        assert result.get(timeout=PATIENCE) == ["a"]
        (row,) = fleet.ended(step.id).steps()
        assert (row.status, row.attempt, row.lost) == ("SUCCESS", 1, 0)
        fleet.expect({step.id: 1})


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_a_rate_limited_task_is_sent_once_however_long_it_waits(each_scenario: Scenario) -> None:
    # One a second: the last waits in the worker for longer than a lease, and until after the relay's first look.
    slow = each_scenario.with_conf(worker_prefetch_multiplier=8, pgqrs_lease=2.0, pgqrs_resend_interval=2.0)
    with Fleet(slow, size=1) as fleet:
        tasks = [named(fleet.tasks.slowly.s()) for _ in range(5)]
        for task in tasks:
            task.delay()
        assert {fleet.ended(task.id).status for task in tasks} == {Status.SUCCESS}
        fleet.expect({task.id: 1 for task in tasks})
        fleet.expect({task.id: 0 for task in tasks}, kind="sent")  # nobody but the client has sent anything


@pytest.mark.parametrize(
    ("fleet", "when"),
    [("postgres", "countdown"), ("postgres", "eta"), ("postgres", "retry"), ("redis", "countdown"), ("redis", "retry")],
    indirect=["fleet"],
)
def test_a_task_that_waits_for_its_time_frees_its_slot(fleet: Fleet, when: str) -> None:
    tasks, log = fleet.tasks, fleet.scenario.log
    if when == "retry":
        waiting = named(tasks.fickle.s([], "a", first="retry", countdown=3600))
        result = waiting.delay()
        wait_for(lambda: result.state == "RETRY", PATIENCE, "the retry to be recorded")
    else:
        waiting = named(tasks.step.s([], "a"))
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        result = waiting.apply_async(countdown=3600) if when == "countdown" else waiting.apply_async(eta=tomorrow)
    before = log.count(waiting.id)
    others = [named(tasks.step.s([], str(n))) for n in range(8)]  # twice as many as there are processes
    for other in others:
        other.delay()
    assert {fleet.ended(other.id).status for other in others} == {Status.SUCCESS}
    assert not fleet.holds(waiting.id)
    assert log.count(waiting.id, "sent") == 0
    assert log.count(waiting.id) == before
    fleet.scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now() WHERE task_id = %s", waiting.id)
    assert result.get(timeout=PATIENCE) == ["a"]
    fleet.expect({waiting.id: before + 1})


@pytest.mark.parametrize("task", ["deadly", "deadly_before_acquire"])
def test_a_step_that_kills_its_worker_every_time_is_given_up_and_the_rest_flows(scenario: Scenario, task: str) -> None:
    with Fleet(scenario.with_conf(pgqrs_max_lost=3), size=1) as fleet:
        deadly, follower = named(getattr(fleet.tasks, task).s()), named(fleet.tasks.step.s("b"))
        note, other = named(fleet.tasks.note.s()), named(fleet.tasks.step.s([], "a"))
        result = (deadly.on_error(note) | follower).delay()
        assert other.delay().get(timeout=PATIENCE) == ["a"]
        with pytest.raises(PoisonedStep, match="killed its worker 3 times"):
            result.get(timeout=PATIENCE)
        run = fleet.ended(deadly.id)
        assert run.status is Status.FAILED
        fleet.expect({deadly.id: 3, follower.id: 0, note.id: 1, other.id: 1})
