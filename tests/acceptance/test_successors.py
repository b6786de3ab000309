"""A process that dies when its step has gone on in another process takes nothing away from that one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest

from tests.support.fleet import Fleet
from tests.support.scenario import LONG_LEASE, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


@pytest.fixture
def one_worker(each_scenario: Scenario) -> Iterator[Fleet]:
    """One worker of two processes, so that who dies and who goes on have the same main process."""
    with Fleet(each_scenario.with_conf(**LONG_LEASE), size=1) as fleet:
        yield fleet


def kill_and_be_noticed(fleet: Fleet, former: int) -> None:
    """Kill a process of the pool, and wait until the main process has done what it does then."""
    fleet.kill("child", former)
    wait_for(lambda: fleet.logged("Worker exited prematurely"), PATIENCE, "the death to be noticed")


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_who_dies_after_it_has_recorded_a_retry_leaves_the_retry_alone(one_worker: Fleet) -> None:
    fleet, points = one_worker, one_worker.scenario.points
    step = named(fleet.tasks.fickle.s([], "a", first="retry", countdown=3600))
    with points.arm("after_retry_stored", step.id) as retried:
        result = step.delay()
        former = retried.wait()
        with points.arm("in_body", step.id) as trap:
            fleet.scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now() WHERE task_id = %s", step.id)
            assert trap.wait() != former
            kill_and_be_noticed(fleet, former)
        assert result.get(timeout=PATIENCE) == ["a"]
    (row,) = fleet.ended(step.id).steps()
    assert (row.status, row.lost) == ("SUCCESS", 0)
    fleet.expect({step.id: 2})


@pytest.mark.parametrize("each_scenario", ["redis"], indirect=True)
def test_who_dies_after_it_was_replaced_leaves_the_last_link_of_the_replacement_alone(one_worker: Fleet) -> None:
    fleet, points, step = one_worker, one_worker.scenario.points, one_worker.tasks.step
    first, last = named(step.s(["x"], "y")), step.s("z")
    replaced = named(fleet.tasks.replacer.s([], json.loads(json.dumps([first, last]))))
    with points.arm("published", first.id) as published:
        with fleet.holding(first):
            result = replaced.delay()
            former = published.wait()
            trap = points.arm("in_body", replaced.id)
        with trap:
            assert trap.wait() != former
            kill_and_be_noticed(fleet, former)
        assert result.get(timeout=PATIENCE) == ["x", "y", "z"]
    assert [row.lost for row in fleet.ended(replaced.id).steps()] == [0, 0]
    fleet.expect({replaced.id: 2, first.id: 1})


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_who_dies_after_it_has_parked_a_function_leaves_the_function_alone(one_worker: Fleet) -> None:
    fleet, points, key = one_worker, one_worker.scenario.points, uuid.uuid4().hex
    with points.arm("parked_at_event", key) as parked, points.arm("before_gather", key) as trap:
        run = fleet.application.functions.journey.delay(key)
        former = parked.wait()
        fleet.application.pgqrs.emit(run, "go", {"who": "me"})
        assert trap.wait() != former
        kill_and_be_noticed(fleet, former)
    assert run.get(timeout=PATIENCE) == ["packed", {"who": "me"}, [1, 2], "landed"]
    assert {row.lost for row in fleet.ended(run.record.root_id).steps()} == {0}
    assert not fleet.logged("another process by now")
