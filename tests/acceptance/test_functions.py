"""Workflow functions: a death before, in and after every kind of wait, and between every two steps."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from pgqrs_celery import Status, WorkflowRun, ids
from pgqrs_celery.states import TERMINAL
from tests.support.fleet import Fleet, Victim
from tests.support.stops import FATES, Fate
from tests.support.waiting import PATIENCE, wait_for

#: What happens in a journey, in order.
EFFECTS = ["pack", "parcel_1", "parcel_2", "fly"]

VICTIMS = ["child", "worker"]


@dataclass(frozen=True, slots=True)
class Row:
    """Where somebody dies; which effect has happened, but is not recorded then; which points nobody passes before.

    Those are points before effects that could be under way in the worker that is killed.
    """

    point: str
    victim: Victim
    twice: str | None = None
    hold: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.victim}-{self.point}"


PARCELS = ("before_parcel_1", "before_parcel_2")

ALSO_ON_REDIS = {"worker-parked_at_nap", "child-parked_at_event", "worker-parked_at_gather", "child-after_start"}

TABLE = [
    Row("before_pack", "child"),
    Row("in_pack", "worker", twice="pack"),
    Row("after_pack", "worker"),
    Row("before_nap", "child"),
    Row("parked_at_nap", "worker", hold=PARCELS),
    Row("parked_at_nap", "child"),
    Row("after_nap", "worker"),
    Row("before_event", "worker"),
    Row("parked_at_event", "worker"),
    Row("parked_at_event", "child"),
    Row("after_event", "child"),
    Row("before_gather", "worker"),
    Row("parked_at_gather", "child", hold=PARCELS),
    Row("parked_at_gather", "worker", hold=PARCELS),
    Row("in_parcel_2", "worker", twice="parcel_2", hold=("before_parcel_1",)),
    Row("after_gather", "worker"),
    Row("before_child", "worker", hold=("before_fly",)),
    Row("after_start", "child"),
    Row("parked_at_child", "worker", hold=("before_fly",)),
    Row("in_fly", "child", twice="fly"),
    Row("after_child", "worker"),
    Row("before_end", "worker"),
]

#: Where the broker matters, because the function or what it waits for has to be sent again, also on Redis.
TABLES = {"postgres": TABLE, "redis": [row for row in TABLE if row.twice or str(row) in ALSO_ON_REDIS]}


def ended(run: WorkflowRun) -> WorkflowRun:
    """Wait until a run has ended."""
    wait_for(lambda: run.status in TERMINAL, PATIENCE, f"run {run.id} to end")
    return run


def check(fleet: Fleet, run: WorkflowRun, key: str, twice: str | None = None) -> None:
    """The journey has come to its end, and everything in it has happened once."""
    assert run.get(timeout=PATIENCE) == ["packed", {"who": "me"}, [1, 2], "landed"]
    assert ended(run).status is Status.SUCCESS
    assert {s.status for s in run.steps()} == {"SUCCESS"}
    fleet.expect({f"{key}/{name}": 1 + (name == twice) for name in EFFECTS})


@pytest.mark.parametrize(
    ("fleet", "row"),
    [pytest.param(broker, row, id=f"{broker}-{row}") for broker in TABLES for row in TABLES[broker]],
    indirect=["fleet"],
)
def test_a_function_goes_on_where_it_was_and_does_nothing_twice(fleet: Fleet, row: Row) -> None:
    functions, key = fleet.application.functions, uuid.uuid4().hex
    points = fleet.scenario.points
    with ExitStack() as held, points.arm(row.point, key) as trap:
        for point in row.hold:
            held.enter_context(points.arm(point, key))
        run = functions.journey.delay(key)
        if row.point not in ("before_event", "parked_at_event"):
            fleet.application.pgqrs.emit(run, "go", {"who": "me"})
        fleet.kill(row.victim, trap.wait())
    fleet.application.pgqrs.emit(run, "go", {"who": "me"})
    check(fleet, run, key, row.twice)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize(
    ("fleet", "point"),
    [
        ("postgres", "recorded_before_publish"),
        ("redis", "recorded_before_publish"),
        ("redis", "after_next_link_before_result"),
        ("redis", "after_result_before_hand_off"),
    ],
    indirect=["fleet"],
)
def test_a_parallel_call_that_is_cut_short_wakes_its_function_all_the_same(
    fleet: Fleet, point: str, victim: Victim
) -> None:
    functions, key, task_id = fleet.application.functions, uuid.uuid4().hex, str(uuid.uuid4())
    points = fleet.scenario.points
    with points.arm(point, ids.call_id(task_id, "parcel#2")) as trap:
        # No parcel must be under way in the worker that is killed; and while the first waits, so does the function.
        with ExitStack() as held:
            for name in PARCELS if point == "recorded_before_publish" else PARCELS[:1]:
                held.enter_context(points.arm(name, key))
            run = functions.journey.apply_async((key,), task_id=task_id)
            fleet.application.pgqrs.emit(run, "go", {"who": "me"})
            fleet.kill(victim, trap.wait())
        check(fleet, run, key)


#: The function's row, which is locked by whoever looks whether it can go on.
WAITER = "SELECT FROM {0}.pgqrs_workflow_steps WHERE task_id = %s AND status = 'PAUSED' FOR NO KEY UPDATE"


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("stopped", ["waking", "result"])
def test_a_parallel_call_that_is_cut_short_after_its_success_wakes_its_function_all_the_same(
    fleet: Fleet, stopped: str, fate: Fate, victim: Victim
) -> None:
    functions, key, task_id = fleet.application.functions, uuid.uuid4().hex, str(uuid.uuid4())
    parcels, stops = [ids.call_id(task_id, f"parcel{nth}") for nth in ("", "#2")], fleet.scenario.stops
    with fleet.scenario.points.arm("before_parcel_2", key) as trap:
        run = functions.journey.apply_async((key,), task_id=task_id)
        fleet.application.pgqrs.emit(run, "go", {"who": "me"})
        pid = trap.wait()
        # The function waits for nothing but the second parcel then.
        done = "SELECT FROM {}.pgqrs_workflow_steps WHERE task_id = %s AND NOT open"
        wait_for(lambda: fleet.scenario.execute(done, parcels[0]), PATIENCE, "the first parcel to be handed off")
        parked = "SELECT FROM {}.pgqrs_workflow_steps WHERE task_id = %s AND status = 'PAUSED' AND awaits IS NOT NULL"
        wait_for(lambda: fleet.scenario.execute(parked, task_id), PATIENCE, "the function to wait")
        stop = stops.locking(WAITER, task_id) if stopped == "waking" else stops.at("result", parcels[1])
        # Where it is told before that, the function goes on: its child must not be in the worker that is killed.
        with stop as waiting, fleet.scenario.points.arm("before_fly", key):
            trap.release()
            (server_pid,) = wait_for(waiting, PATIENCE, "a transaction to be stopped")
            committed = "SELECT FROM {}.pgqrs_workflow_steps WHERE task_id = %s AND status = 'SUCCESS' AND open"
            assert fleet.scenario.execute(committed, parcels[1])
            fleet.kill(victim, pid)
            stops.decide(fate, server_pid)
    check(fleet, run, key)


@pytest.mark.parametrize(
    "row",
    [
        Row("in_hotel", "child", twice="hotel"),
        Row("in_undo_hotel", "worker", twice="undo_hotel"),
        Row("in_undo_flight", "child", twice="undo_flight"),
    ],
    ids=str,
)
def test_what_a_failed_function_had_done_is_undone_whoever_dies(fleet: Fleet, row: Row) -> None:
    functions, key = fleet.application.functions, uuid.uuid4().hex
    with fleet.scenario.points.arm(row.point, key) as trap:
        run = functions.doomed.delay(key)
        fleet.kill(row.victim, trap.wait())
        with pytest.raises(ValueError, match="as the test asked for"):
            run.get(timeout=PATIENCE)
    names = ["flight", "hotel", "undo_hotel", "undo_flight"]
    fleet.expect({f"{key}/{name}": 1 + (name == row.twice) for name in names})
    order = [effect.name for effect in fleet.scenario.log.read() if effect.task_id.startswith(key)]
    assert list(dict.fromkeys(order)) == names


@pytest.mark.parametrize("fleet", ["brief_postgres"], indirect=True)
def test_a_frozen_worker_that_comes_back_changes_nothing(fleet: Fleet) -> None:
    functions, key = fleet.application.functions, uuid.uuid4().hex
    with fleet.scenario.points.arm("in_pack", key) as trap:
        run = functions.journey.delay(key)
        frozen = fleet.owner(trap.wait())
        frozen.freeze()
        trap.release()
        fleet.application.pgqrs.emit(run, "go", {"who": "me"})
        check(fleet, run, key, twice="pack")
        frozen.thaw()
        wait_for(lambda: "another process by now" in frozen.output(), PATIENCE, "the former owner to notice")
    assert ended(run).status is Status.SUCCESS
    fleet.expect({f"{key}/pack": 2})
