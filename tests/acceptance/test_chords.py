"""Chords on one Postgres: a death at every point between a header's last member and the end of the body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import chain, chord
from celery.result import AsyncResult

from pgqrs_celery import Status
from tests.acceptance.test_dead_workers import SLOW
from tests.support.fleet import Fleet, Victim
from tests.support.scenario import Scenario
from tests.support.stops import FATES, Fate
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

VICTIMS = ["child", "worker"]

#: The chord's row, which is locked by whoever looks whether all parts are in.
CHORD = "SELECT FROM {0}.pgqrs_chords WHERE body_id = %s FOR NO KEY UPDATE"


@dataclass(slots=True)
class Case:
    """A chord of two members whose second one is held in its body until the first has been handed off."""

    fleet: Fleet
    first: Any = field(init=False)
    last: Any = field(init=False)
    body: Any = field(init=False)

    def __post_init__(self) -> None:
        step = self.fleet.tasks.step
        self.first, self.last, self.body = named(step.s([], "a")), named(step.s([], "b")), named(step.s("c"))

    @contextmanager
    def at_the_last(self) -> Iterator[tuple[AsyncResult[Any], int]]:
        """Yield the result and the pid of the process that has the last member; it goes on at the end."""
        with self.fleet.scenario.points.arm("in_body", self.last.id) as trap:
            result: AsyncResult[Any] = chord([self.first, self.last], self.body).delay()
            pid = trap.wait()
            self.wait_for_the_first()
            yield result, pid

    def wait_for_the_first(self) -> None:
        """Wait until nobody has the first member in hand."""
        done, execute = (
            "SELECT FROM {}.pgqrs_workflow_steps WHERE task_id = %s AND NOT open",
            self.fleet.scenario.execute,
        )
        wait_for(lambda: execute(done, self.first.id), PATIENCE, "the first member to be handed off")

    def ends_well(self, result: AsyncResult[Any], twice: Any = None) -> None:
        """The body has had every member's value, and everything has happened once, but for one link."""
        assert result.get(timeout=PATIENCE) == [["a"], ["b"], "c"]
        run = self.fleet.ended(self.fleet.root_of(self.body.id))
        assert run.status is Status.SUCCESS
        assert [s.status for s in run.steps()] == ["SUCCESS"] * 3
        self.fleet.expect({each.id: 1 + (each is twice) for each in (self.first, self.last, self.body)})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize(
    ("point", "whose"),
    [
        ("delivered_before_acquire", "last"),
        ("in_body", "last"),
        ("after_body_before_commit", "last"),
        ("after_hand_off_before_ack", "last"),
        ("delivered_before_acquire", "body"),
        ("in_body", "body"),
        ("after_body_before_commit", "body"),
        ("after_hand_off_before_ack", "body"),
    ],
)
def test_a_chord_s_body_runs_once_for_all_that_its_members_die(
    fleet: Fleet, point: str, whose: str, victim: Victim
) -> None:
    case, points = Case(fleet), fleet.scenario.points
    stopped = getattr(case, whose)
    with (
        points.arm("delivered_before_acquire" if whose == "last" else "nowhere", case.body.id),
        points.arm(point, stopped.id) as trap,
    ):
        result = chord([case.first, case.last], case.body).delay()
        victim_pid = trap.wait()
        case.wait_for_the_first()
        fleet.kill(victim, victim_pid)
    case.ends_well(result, twice=stopped if point in ("in_body", "after_body_before_commit") else None)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize(
    ("what", "whose"), [("part", "last"), ("row", "body"), ("message", "body"), ("result", "body")]
)
def test_whatever_a_chord_commits_happens_as_a_whole_or_not_at_all(
    fleet: Fleet, what: str, whose: str, fate: Fate, victim: Victim
) -> None:
    case, stops = Case(fleet), fleet.scenario.stops
    stopped = getattr(case, whose)
    with stops.at(what, stopped.id) as waiting:
        with case.at_the_last() as (result, pid):
            pass
        (server_pid,) = wait_for(waiting, PATIENCE, "a transaction to be stopped")
        fleet.kill(victim, executing(fleet, case.body.id) if what == "result" else pid)
        stops.decide(fate, server_pid)
    twice = stopped if what in ("part", "result") and fate == "rolls_back" else None
    case.ends_well(result, twice)
    assert stops.count("row", case.body.id) == 1
    assert stops.sent_with_its_row(case.body.id) == 1


def executing(fleet: Fleet, task_id: str) -> int:
    """Return the process that executes a task."""
    *_, last = [effect.pid for effect in fleet.scenario.log.read("body") if effect.task_id == task_id]
    return last


@pytest.mark.parametrize("victim", VICTIMS)
def test_who_dies_before_he_has_looked_leaves_the_chord_to_others(fleet: Fleet, victim: Victim) -> None:
    case, stops = Case(fleet), fleet.scenario.stops
    with ExitStack() as held:
        with case.at_the_last() as (result, pid):
            waiting = held.enter_context(stops.locking(CHORD, case.body.id))
        (server_pid,) = wait_for(waiting, PATIENCE, "the last member to look at its chord")
        assert stops.count("part", case.last.id) == 1
        fleet.kill(victim, pid)
        stops.decide("rolls_back", server_pid)
    case.ends_well(result)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_body_that_was_recorded_is_sent_whoever_dies_then(scenario: Scenario, victim: Victim) -> None:
    # Nobody would send it again for an hour.
    with Fleet(scenario.with_conf(**SLOW)) as fleet:
        case, stops = Case(fleet), scenario.stops
        with stops.at("message", case.body.id) as waiting:
            with case.at_the_last() as (result, pid):
                pass
            (server_pid,) = wait_for(waiting, PATIENCE, "the body to be sent")
            fleet.kill(victim, pid)
            stops.decide("rolls_back", server_pid)
        case.ends_well(result)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_header_that_was_recorded_is_sent_whoever_dies_then(scenario: Scenario, victim: Victim) -> None:
    with Fleet(scenario.with_conf(**SLOW)) as fleet:
        case, stops, before = Case(fleet), scenario.stops, named(fleet.tasks.step.s([], "z"))
        case.first.set(immutable=True)
        case.last.set(immutable=True)
        with stops.at("message", case.last.id) as waiting:
            result = chain(before, chord([case.first, case.last], case.body)).delay()
            (server_pid,) = wait_for(waiting, PATIENCE, "the header to be sent")
            fleet.kill(victim, executing(fleet, before.id))
            stops.decide("rolls_back", server_pid)
        assert result.get(timeout=PATIENCE) == [["a"], ["b"], "c"]
        assert fleet.ended(before.id).status is Status.SUCCESS
        assert [scenario.stops.count("row", each.id) for each in (case.first, case.last, case.body)] == [1] * 3
        fleet.expect({before.id: 2, case.first.id: 1, case.last.id: 1, case.body.id: 1})
