"""The crash table: a chain of three, and a death at every point in the life of its second link.

A *child* is one process of a worker's pool; a *worker* is all its processes at once. On one Postgres a step's success,
result, next link and message end in one transaction: there are fewer moments to die in, and a next link that was not
sent means that the body runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from celery import chain
from celery.result import AsyncResult

from pgqrs_celery import Status
from tests.support.fleet import Fleet, Victim
from tests.support.scenario import Scenario
from tests.support.stops import FATES, Fate
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


@dataclass(frozen=True, slots=True)
class Row:
    """Where somebody dies: a point in the life of one link; and whose body runs twice then."""

    point: str
    link: int
    twice: int | None = None
    #: The same on one Postgres; NOWHERE if there is no such moment.
    unit: int | None = None

    def __str__(self) -> str:
        return f"{self.point}-of-{self.link}"

    def bodies(self, links: Sequence[Any], scenario: Scenario) -> dict[str, int]:
        """Return how often every body runs."""
        twice = self.unit if scenario.on_one_postgres else self.twice
        return {link.id: 1 + (number == twice) for number, link in enumerate(links, 1)}


NOWHERE = -1


TABLE = [
    Row("recorded_before_publish", 2, unit=1),
    Row("delivered_before_acquire", 2),
    Row("in_body", 2, twice=2, unit=2),
    Row("after_body_before_commit", 2, twice=2, unit=2),
    Row("recorded_before_publish", 3, unit=2),  # the second has succeeded, the third is not sent
    Row("after_next_link_before_result", 2, unit=NOWHERE),
    Row("after_result_before_hand_off", 2, unit=NOWHERE),
    Row("after_hand_off_before_ack", 2),
    Row("after_next_link_before_result", 3, unit=NOWHERE),  # the last: no link follows, and the run is to be closed
    Row("after_result_before_hand_off", 3, unit=NOWHERE),
    Row("after_hand_off_before_ack", 3),
]
VICTIMS = ["child", "worker"]
CASES = [
    pytest.param(
        row, broker, victim, id=f"{row}-{victim}-{broker}", marks=[pytest.mark.rabbitmq] * (broker == "rabbitmq")
    )
    for broker in ("postgres", "local", "redis", "local_redis", "rabbitmq")
    for row in TABLE
    for victim in VICTIMS
    if broker not in ("postgres", "local") or row.unit != NOWHERE
]
REDELIVERED = [
    case
    for case in CASES
    if case.values[0].point != "recorded_before_publish"  # type: ignore[attr-defined]
    and case.values[1] not in ("local", "rabbitmq")
]


def killed_at(fleet: Fleet, row: Row, links: Sequence[Any], victim: Victim) -> AsyncResult[Any]:
    """Send the chain and kill somebody at the row's point; the body of a link after it is not begun before that.

    A link whose sender stalls before he publishes it may have been published by a relay.
    """
    after = row.link - 1 if row.point == "recorded_before_publish" else row.link
    with fleet.holding(*links[after:]), fleet.scenario.points.arm(row.point, links[row.link - 1].id) as trap:
        result: AsyncResult[Any] = chain(*links).delay()
        fleet.kill(victim, trap.wait())
    return result


@pytest.mark.parametrize(("row", "fleet", "victim"), CASES, indirect=["fleet"])
def test_a_chain_completes_and_only_a_body_cut_short_runs_again(fleet: Fleet, row: Row, victim: Victim) -> None:
    step = fleet.tasks.step
    links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
    result = killed_at(fleet, row, links, victim)
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    run = fleet.ended(links[0].id)
    assert run.status is Status.SUCCESS
    assert [s.status for s in run.steps()] == ["SUCCESS"] * 3
    fleet.expect(row.bodies(links, fleet.scenario))
    if fleet.broker == "postgres" and not fleet.scenario.goes_on:
        stops, interval = fleet.scenario.stops, timedelta(seconds=fleet.application.pgqrs.settings.resend_interval)
        assert [stops.sent_with_its_row(link.id) for link in links] == [1] * 3
        # What dead processes had in hand is sent again by a relay, at once; nothing else is before its time.
        in_hand = {row.unit or row.link, row.link + 1 if row.point == "after_hand_off_before_ack" else None}
        others = [link for number, link in enumerate(links, 1) if number not in in_hand]
        assert all(after >= interval for link in others for after in stops.copies_after(link.id))


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize(
    ("fleet", "stopped"),
    [
        ("postgres", "message of the next"),
        ("postgres", "result of the last"),
        ("local", "row of the next"),
        ("local", "result of the last"),
    ],
    indirect=["fleet"],
)
def test_a_unit_of_work_that_is_under_way_happens_as_a_whole_or_not_at_all(
    fleet: Fleet, stopped: str, fate: Fate, victim: Victim
) -> None:
    step, scenario = fleet.tasks.step, fleet.scenario
    links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
    sender = links[2] if stopped == "result of the last" else links[1]
    with scenario.stops.at(stopped.split()[0], links[2].id) as waiting:
        result = chain(*links).delay()
        (server_pid,) = wait_for(waiting, PATIENCE, "a transaction to be stopped")
        (body,) = [effect for effect in scenario.log.read("body") if effect.task_id == sender.id]
        fleet.kill(victim, body.pid)
        scenario.stops.decide(fate, server_pid)
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    run = fleet.ended(links[0].id)
    assert [s.status for s in run.steps()] == ["SUCCESS"] * 3
    fleet.expect({link.id: 1 + (fate == "rolls_back" and link is sender) for link in links})
    assert [scenario.stops.count("result", link.id) for link in links] == [1] * 3
    assert [scenario.stops.count("row", link.id) for link in links] == [1] * 3
    if not scenario.goes_on:
        assert [scenario.stops.sent_with_its_row(link.id) for link in links] == [1] * 3


@pytest.mark.parametrize(("row", "fleet", "victim"), REDELIVERED, indirect=["fleet"])
def test_a_message_that_the_broker_delivers_again_changes_nothing(fleet: Fleet, row: Row, victim: Victim) -> None:
    late = fleet.tasks.late
    links = [named(late.s([], "a")), named(late.s("b")), named(late.s("c"))]
    result = killed_at(fleet, row, links, victim)
    fleet.deliver_again()
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    run = fleet.ended(links[0].id)
    assert run.status is Status.SUCCESS
    if row.point == "after_hand_off_before_ack" and victim == "worker" and fleet.broker != "postgres":
        # A process that has gone on has the message of the first link.
        sent = links[0] if fleet.scenario.goes_on else links[row.link - 1]
        answer = f"{sent.id}] is left alone: DONE"
        wait_for(lambda: fleet.logged(answer), PATIENCE, "the copy to be answered")
    fleet.expect(row.bodies(links, fleet.scenario))


@pytest.mark.parametrize("fleet", ["postgres", "local", "redis", "local_redis"], indirect=True)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", ["after_fail_before_consequences", "after_consequences_before_hand_off"])
def test_a_failure_has_its_consequences_once(fleet: Fleet, point: str, victim: Victim) -> None:
    tasks = fleet.tasks
    first, failing, last = named(tasks.step.s([], "a")), named(tasks.fail.s()), named(tasks.step.s("c"))
    errback = named(tasks.note.s())
    failing.link_error(errback)
    with fleet.scenario.points.arm(point, failing.id) as trap:
        with fleet.holding(errback):
            result = chain(first, failing, last).delay()
            fleet.kill(victim, trap.wait())
        with pytest.raises(ValueError, match="as the test asked for"):
            result.get(timeout=PATIENCE)
    assert fleet.ended(first.id).status is Status.FAILED
    fleet.expect({first.id: 1, failing.id: 1, last.id: 0, errback.id: 1})
