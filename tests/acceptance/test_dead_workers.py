"""A death is noticed by itself, not by the end of a lease."""

from __future__ import annotations

import pytest

from tests.support.fleet import Fleet, Victim
from tests.support.scenario import Scenario
from tests.support.stops import FATES
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

#: A lease, and intervals, that no test lives to see the end of.
SLOW = {"pgqrs_lease": 3600.0, "pgqrs_resend_interval": 3600.0, "pgqrs_resend_interval_max": 3600.0}


ROWS = [
    ("postgres", "delivered_before_acquire", "child"),
    ("postgres", "in_body", "child"),
    ("postgres", "in_body", "worker"),
    ("redis", "in_body", "worker"),
    ("redis", "after_result_before_hand_off", "child"),
    ("redis", "after_result_before_hand_off", "worker"),
]


@pytest.mark.parametrize(("each_scenario", "point", "victim"), ROWS, indirect=["each_scenario"])
def test_no_death_waits_for_a_lease(each_scenario: Scenario, point: str, victim: Victim) -> None:
    with Fleet(each_scenario.with_conf(**SLOW), size=1 if victim == "child" else 2) as fleet:
        step = named(fleet.tasks.step.s([], "a"))
        with fleet.scenario.points.arm(point, step.id) as trap:
            result = step.delay()
            fleet.kill(victim, trap.wait())
            assert result.get(timeout=PATIENCE) == ["a"]
        assert fleet.ended(step.id).status == "SUCCESS"
        fleet.expect({step.id: 2 if point == "in_body" else 1})


@pytest.mark.parametrize(
    ("each_scenario", "point"),
    [("postgres", "in_body"), ("redis", "in_body"), ("redis", "after_result_before_hand_off")],
    indirect=["each_scenario"],
)
def test_one_worker_that_is_killed_and_started_again_waits_for_no_lease(each_scenario: Scenario, point: str) -> None:
    with Fleet(each_scenario.with_conf(**SLOW), size=1) as fleet:
        step = named(fleet.tasks.step.s([], "a"))
        with fleet.scenario.points.arm(point, step.id) as trap:
            result = step.delay()
            fleet.kill("worker", trap.wait())
            assert result.get(timeout=PATIENCE) == ["a"]
        fleet.expect({step.id: 2 if point == "in_body" else 1})


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_no_death_in_a_unit_of_work_waits_for_a_lease(scenario: Scenario, victim: Victim) -> None:
    with Fleet(scenario.with_conf(**SLOW), size=1 if victim == "child" else 2) as fleet:
        for count, fate in enumerate(FATES, 1):
            step = named(fleet.tasks.step.s([], fate))
            with scenario.stops.at("result", step.id) as waiting:
                result = step.delay()
                (server_pid,) = wait_for(waiting, PATIENCE, "the step's transaction to be stopped")
                (body,) = [effect for effect in scenario.log.read("body") if effect.task_id == step.id]
                fleet.kill(victim, body.pid)
                scenario.stops.decide(fate, server_pid)
            assert result.get(timeout=PATIENCE) == [fate]
            assert fleet.ended(step.id).status == "SUCCESS"
            fleet.expect({step.id: count})
