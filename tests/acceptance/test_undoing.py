"""A function that ends where its own code cannot see it undoes what it has done all the same."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded

from pgqrs_celery import PoisonedStep, RunCancelled, Status, WorkflowRun
from tests.support.fleet import Fleet
from tests.support.waiting import PATIENCE, wait_for

DONE = ["flight", "hotel", "boat", "car"]
UNDONE = ["undo_car", "undo_boat", "undo_hotel", "undo_flight"]

#: Seconds: time enough for every execution of the function to come to where it is to be, on a busy machine, too.
LIMIT = 8


@pytest.fixture
def key() -> str:
    """What the effects of this test are named after."""
    return uuid.uuid4().hex


def undone(fleet: Fleet, key: str) -> list[str]:
    """What was undone, in order."""
    effects = [effect.name for effect in fleet.scenario.log.read() if effect.task_id.startswith(key)]
    return list(dict.fromkeys(name for name in effects if name.startswith("undo")))


def check(fleet: Fleet, key: str, run: WorkflowRun, status: str, twice: str | None = None, thought: int = 1) -> None:
    """Everything was done once and undone in reverse order; the function's row says how it ended."""
    fleet.wait_for(run, lambda: row_of(run).status == status, f"have its function {status}")
    assert undone(fleet, key) == UNDONE
    counts = {f"{key}/{name}": 1 + (name == twice) for name in [*DONE, *UNDONE]}
    fleet.expect({**counts, f"{key}/think": thought})
    assert {step.status for step in run.steps() if step.task_name == "book"} <= {"CANCELLED"}


def row_of(run: WorkflowRun) -> Any:
    """The row of the run's function."""
    return next(step for step in run.steps() if step.kind == "function")


@pytest.mark.parametrize("dies", [None, "in_undo_boat", "in_undo_flight"])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_after_a_hard_time_limit_everything_is_undone(fleet: Fleet, key: str, dies: str | None) -> None:
    points = fleet.scenario.points
    with points.arm("in_think", key), points.arm(dies or "nowhere", key) as trap:
        run = fleet.application.functions.trip.apply_async((key,), time_limit=LIMIT)
        if dies:
            fleet.kill("worker", trap.wait())
        with pytest.raises(TimeLimitExceeded):
            run.get(timeout=PATIENCE)
    check(fleet, key, run, "FAILED", twice=dies and dies.removeprefix("in_"))
    assert run.status is Status.FAILED


@pytest.mark.parametrize("fleet", ["postgres"], indirect=True)
def test_a_function_that_no_worker_survives_is_undone(fleet: Fleet, key: str) -> None:
    points, deaths = fleet.scenario.points, fleet.application.pgqrs.settings.max_lost
    trip = fleet.application.functions.trip
    with ExitStack() as armed:
        trap = armed.enter_context(points.arm("in_think", key))
        run = trip.delay(key)
        for _ in range(deaths):
            pid = trap.wait()
            trap = armed.enter_context(points.arm("in_think", key))  # before the next execution can have come by
            fleet.kill("child", pid)
        with pytest.raises(PoisonedStep):
            run.get(timeout=PATIENCE)
    check(fleet, key, run, "FAILED", thought=deaths)


@pytest.mark.parametrize("dies", [None, "in_undo_hotel"])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_a_function_that_is_cancelled_in_its_sleep_undoes_what_it_has_done(
    fleet: Fleet, key: str, dies: str | None
) -> None:
    points = fleet.scenario.points
    with points.arm(dies or "nowhere", key) as trap:
        run = fleet.application.functions.trip.delay(key)
        wait_for(lambda: row_of(run).status == "PAUSED" and fleet.scenario.log.count(f"{key}/think"), PATIENCE, "sleep")
        run.cancel()
        if dies:
            fleet.kill("child", trap.wait())
        with pytest.raises(RunCancelled):
            run.get(timeout=PATIENCE)
        check(fleet, key, run, "CANCELLED", twice=dies and dies.removeprefix("in_"))
    assert run.status is Status.CANCELLED


@pytest.mark.parametrize("terminate", [False, True])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_a_function_that_is_cancelled_while_it_runs_undoes_what_it_has_done(
    fleet: Fleet, key: str, terminate: bool
) -> None:
    with fleet.scenario.points.arm("in_think", key) as trap:
        run = fleet.application.functions.trip.delay(key)
        trap.wait()
        run.cancel(terminate=terminate)
        check(fleet, key, run, "CANCELLED")


@pytest.mark.parametrize("fleet", ["postgres"], indirect=True)
def test_a_function_whose_task_is_terminated_undoes_what_it_has_done(fleet: Fleet, key: str) -> None:
    with fleet.scenario.points.arm("in_think", key) as trap:
        run = fleet.application.functions.trip.delay(key)
        trap.wait()
        fleet.application.celery.control.revoke(row_of(run).task_id, terminate=True)
        check(fleet, key, run, "CANCELLED")


@pytest.mark.parametrize("fleet", ["postgres"], indirect=True)
def test_a_run_that_was_undone_after_a_time_limit_can_be_resumed(fleet: Fleet, key: str) -> None:
    with fleet.scenario.points.arm("in_think", key):
        run = fleet.application.functions.trip.apply_async((key,), time_limit=LIMIT)
        with pytest.raises(TimeLimitExceeded):
            run.get(timeout=PATIENCE)
    fleet.application.pgqrs.emit(run, "answer")
    assert run.resume().get(timeout=PATIENCE) is None
    fleet.expect({f"{key}/{name}": 2 for name in DONE} | {f"{key}/{name}": 1 for name in UNDONE})
