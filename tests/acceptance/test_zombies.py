"""A worker that stalls for longer than its lease, and then goes on: nothing of what it does then counts."""

from __future__ import annotations

import pytest
from celery import chain, states

from pgqrs_celery import Status
from tests.support.fleet import Fleet
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

#: The points of the hand-off at which a worker is frozen: (broker, point, link).
HANDING_OFF = [
    ("brief_postgres", "recorded_before_publish", 3),  # on one Postgres that is in the middle of its transaction
    ("brief_postgres", "after_body_before_commit", 2),
    ("brief_postgres", "after_hand_off_before_ack", 2),
    ("brief_local", "recorded_before_publish", 3),
    ("brief_local", "after_body_before_commit", 2),
    ("brief_local", "after_hand_off_before_ack", 2),
    ("brief_redis", "recorded_before_publish", 3),
    ("brief_redis", "after_next_link_before_result", 2),
    ("brief_redis", "after_result_before_hand_off", 2),
]
ENDS = {
    "succeed": "belongs to another worker by now",
    "fail": "the failure ValueError('the first execution fails') is not stored",
    "retry": "] ignored",
}
ROWS = [*((fleet, end) for fleet in ("brief_postgres", "brief_local") for end in ENDS), ("brief_redis", "succeed")]


@pytest.mark.parametrize(("fleet", "end"), ROWS, indirect=["fleet"])
def test_however_a_zombie_s_body_ends_the_new_owner_s_success_stays(fleet: Fleet, end: str) -> None:
    tasks = fleet.tasks
    links = [named(tasks.step.s([], "a")), named(tasks.fickle.s("b", first=end)), named(tasks.step.s("c"))]
    errback = named(tasks.note.s())
    links[1].link_error(errback)
    with fleet.scenario.points.arm("in_body", links[1].id) as trap:
        result = chain(*links).delay()
        zombie = fleet.owner(trap.wait())
        zombie.freeze()
        try:
            assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
            run = fleet.ended(links[0].id)
        finally:
            zombie.thaw()
    wait_for(lambda: ENDS[end] in zombie.output(), PATIENCE, f"the zombie to say {ENDS[end]!r}")
    assert run.status is Status.SUCCESS
    assert [step.status for step in run.steps()] == ["SUCCESS"] * 3
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    fleet.expect({links[0].id: 1, links[1].id: 2, links[2].id: 1, errback.id: 0})


@pytest.mark.parametrize(("fleet", "point", "link"), HANDING_OFF, indirect=["fleet"])
def test_a_zombie_s_hand_off_starts_nothing_a_second_time(fleet: Fleet, point: str, link: int) -> None:
    step = fleet.tasks.step
    links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
    callback = named(fleet.tasks.step.s("callback"))
    links[1].link(callback)
    points = fleet.scenario.points
    with points.arm(point, links[link - 1].id) as trap:
        with fleet.holding(links[2], callback):  # the zombie must not have what follows in its body
            result = chain(*links).delay()
            zombie = fleet.owner(trap.wait())
            zombie.freeze()
        try:
            assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
            run = fleet.ended(links[0].id)
        finally:
            zombie.thaw()
    wait_for(lambda: f"[{links[1].id}] succeeded" in zombie.output(), PATIENCE, "the zombie to finish")
    assert run.status is Status.SUCCESS
    # On one Postgres what follows from a step is sent in its own transaction: until that is over the step is not.
    twice = fleet.broker == "postgres" and point != "after_hand_off_before_ack"
    fleet.expect({links[0].id: 1, links[1].id: 1 + twice, links[2].id: 1, callback.id: 1})


@pytest.mark.parametrize("fleet", ["brief_redis"], indirect=True)
def test_a_failure_s_zombie_does_not_end_the_hand_off_of_what_was_executed_after_a_resume(fleet: Fleet) -> None:
    points, fickle = fleet.scenario.points, named(fleet.tasks.fickle.s([], "a", first="fail"))
    with points.arm("after_consequences_before_hand_off", fickle.id) as failing:
        result = fickle.delay()
        zombie = fleet.owner(failing.wait())
        zombie.freeze()
        try:
            run = fleet.ended(fickle.id)  # somebody else has repeated the hand-off
            assert run.status is Status.FAILED
            with points.arm("after_next_link_before_result", fickle.id) as succeeding:
                run.resume()
                second = succeeding.wait()
                zombie.thaw()
                failing.release()
                wait_for(lambda: "raised unexpected" in zombie.output(), PATIENCE, "the zombie to finish")
                fleet.kill("worker", second)
        finally:
            zombie.thaw()
    wait_for(lambda: result.state == states.SUCCESS, PATIENCE, "the result of the second execution")
    assert result.get(timeout=PATIENCE) == ["a"]
    assert fleet.ended(fickle.id).status is Status.SUCCESS
    fleet.expect({fickle.id: 2})
