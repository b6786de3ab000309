"""Ends that the worker's main process decides on: time limits, revocation, cancellation."""

from __future__ import annotations

import pytest
from celery import chain
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from pgqrs_celery import Status
from tests.support.copies import sent_messages
from tests.support.fleet import Fleet
from tests.support.scenario import LONG_LEASE, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


def test_a_step_that_runs_out_of_time_fails_its_run_once(fleet: Fleet) -> None:
    tasks = fleet.tasks
    limited, follower, note = named(tasks.limited.s()), named(tasks.step.s("b")), named(tasks.note.s())
    with fleet.scenario.points.arm("in_body", limited.id) as trap:
        result = chain(limited.on_error(note), follower).delay()
        trap.wait()
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=PATIENCE)
    assert fleet.ended(limited.id).status is Status.FAILED
    wait_for(lambda: fleet.scenario.log.count(note.id) == 1, PATIENCE, "the errback to be called")
    fleet.expect({limited.id: 1, follower.id: 0, note.id: 1})


@pytest.mark.parametrize("how", ["revoke", "cancel"])
def test_a_step_that_is_ended_by_force_ends_its_run(fleet: Fleet, how: str) -> None:
    step = fleet.tasks.step
    first, second, third = links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
    with fleet.scenario.points.arm("in_body", second.id) as trap:
        result = chain(*links).delay()
        trap.wait()
        run = fleet.run_of(first.id)
        if how == "revoke":
            fleet.application.celery.control.revoke(second.id, terminate=True)
        else:
            run.cancel(terminate=True)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
    assert fleet.ended(first.id).status is Status.CANCELLED
    assert {s.task_id: s.status for s in run.steps()} == {first.id: "SUCCESS", second.id: "CANCELLED"}
    fleet.expect({first.id: 1, second.id: 1, third.id: 0})


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_a_copy_of_its_message_does_not_hide_a_step_from_who_ends_it_by_force(each_scenario: Scenario) -> None:
    with Fleet(each_scenario.with_conf(**LONG_LEASE), size=1) as fleet:
        app, (worker,) = fleet.application.celery, fleet.workers
        step = named(fleet.tasks.step.s([], "a"))
        with fleet.scenario.points.arm("in_body", step.id) as trap, sent_messages() as messages:
            result = step.delay()
            pid = trap.wait()
            messages[step.id].deliver_again(app)
            wait_for(lambda: fleet.logged(f"Task step[{step.id}] ignored"), PATIENCE, "the copy to end")
            inspect = app.control.inspect([worker.hostname], timeout=PATIENCE, limit=1)

            def heard() -> bool:
                begun = inspect.stats()[worker.hostname]["total"]["step"]
                return begun == 2 and len(inspect.active()[worker.hostname]) == 1

            wait_for(heard, PATIENCE, "the main process to hear of both")
            app.control.revoke(step.id, terminate=True)
            with pytest.raises(TaskRevokedError):
                result.get(timeout=PATIENCE)
            wait_for(lambda: not worker.has(pid), PATIENCE, "the process to end")
        assert fleet.ended(step.id).status is Status.CANCELLED
        fleet.expect({step.id: 1})
