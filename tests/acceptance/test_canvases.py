"""What a canvas promises while processes die, messages come twice, and nobody knows everybody's tasks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from celery import chain, chord, group

from pgqrs_celery import Status
from tests.support.copies import sent_messages
from tests.support.fleet import Fleet, Victim
from tests.support.sender import Sender
from tests.support.stops import FATES, Fate
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

VICTIMS = ["child", "worker"]


@pytest.mark.parametrize("fleet", ["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)], indirect=True)
@pytest.mark.parametrize("point", ["recorded_before_publish", "published"])
def test_a_sender_s_death_loses_nothing_it_has_recorded(fleet: Fleet, point: str) -> None:
    members = [named(fleet.tasks.step.s([], label)) for label in "abc"]
    with (
        fleet.scenario.points.arm(point, members[1].id) as trap,
        Sender(fleet.scenario, group(members)) as sender,
    ):
        trap.wait()
        sender.kill()
    assert fleet.ended(fleet.root_of(members[0].id)).status is Status.SUCCESS
    fleet.expect({member.id: 1 for member in members})


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("kind", [group, chain, chord])
def test_what_a_dying_sender_has_sent_is_there_as_a_whole_or_not_at_all(fleet: Fleet, kind: Any, fate: Fate) -> None:
    links = [named(fleet.tasks.step.si([], label)) for label in "abc"]
    canvas = chord(links[:2], links[2]) if kind is chord else kind(links)
    sent_at_once = {group: links, chain: links[:1], chord: links[:2]}[kind]
    stops = fleet.scenario.stops
    with stops.at("message", sent_at_once[-1].id) as waiting, Sender(fleet.scenario, canvas) as sender:
        (server_pid,) = wait_for(waiting, PATIENCE, "the sender's transaction to be stopped")
        sender.kill()
        assert [stops.count(what, each.id) for what in ("row", "message") for each in links] == [0] * 6
        stops.decide(fate, server_pid)
    if fate == "commits":
        wait_for(lambda: stops.count("row", links[0].id), PATIENCE, "the sender's transaction to be committed")
        assert fleet.ended(fleet.root_of(links[0].id)).status is Status.SUCCESS
    assert [stops.count("row", link.id) for link in links] == [int(fate == "commits")] * 3
    assert [stops.sent_with_its_row(link.id) for link in links] == [int(fate == "commits")] * 3
    if fate == "rolls_back":
        assert [stops.count("message", link.id) for link in links] == [0] * 3
    fleet.expect({link.id: int(fate == "commits") for link in links})


@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_a_relay_s_death_in_the_middle_of_sending_loses_nothing(fleet: Fleet) -> None:
    step, points = named(fleet.tasks.step.s([], "a")), fleet.scenario.points
    with (
        points.arm("recorded_before_publish", step.id) as trap,
        points.arm("claimed_before_publish", step.id) as claimed,
        Sender(fleet.scenario, step) as sender,
    ):
        trap.wait()
        sender.kill()
        fleet.kill("worker", claimed.wait())
        assert fleet.ended(fleet.root_of(step.id)).status is Status.SUCCESS
    fleet.expect({step.id: 1})


@pytest.mark.parametrize("point", ["claimed_before_publish", "relayed", *FATES])
def test_a_relay_s_death_in_the_middle_of_sending_on_postgres_loses_nothing(fleet: Fleet, point: Any) -> None:
    step, scenario = named(fleet.tasks.step.s([], "a")), fleet.scenario
    result = step.apply_async(countdown=3600)
    with ExitStack() as held:
        trap = held.enter_context(
            scenario.points.arm(point if point == "relayed" else "claimed_before_publish", step.id)
        )
        waiting = held.enter_context(scenario.stops.at("message", step.id)) if point in FATES else None
        # What is published may be taken at once, by the relay's own worker, too: its death must not meet a body.
        started = scenario.points.arm("delivered_before_acquire", step.id) if point == "relayed" else None
        if started is not None:
            held.enter_context(started)
        scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now() WHERE task_id = %s", step.id)
        scenario.execute("SELECT {}.pgqrs_call_relays('acceptance')")
        relay = trap.wait()
        if waiting is None:
            if started is not None:
                started.wait()
            fleet.kill("worker", relay)
        else:
            trap.release()
            (server_pid,) = wait_for(waiting, PATIENCE, "the relay's statement to be stopped")
            fleet.kill("worker", relay)
            scenario.stops.decide(point, server_pid)
    assert result.get(timeout=PATIENCE) == ["a"]
    assert fleet.ended(step.id).status is Status.SUCCESS
    fleet.expect({step.id: 1})


@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_a_group_is_not_over_when_its_first_member_ends_before_the_second_is_published(fleet: Fleet) -> None:
    members = [named(fleet.tasks.step.s([], label)) for label in "abc"]
    with (
        fleet.scenario.points.arm("recorded_before_publish", members[1].id) as trap,
        Sender(fleet.scenario, group(members)) as sender,
    ):
        trap.wait()
        result = fleet.application.celery.AsyncResult(members[0].id)
        assert result.get(timeout=PATIENCE) == ["a"]
        run = fleet.run_of(fleet.root_of(members[0].id))
        wait_for(lambda: not run.steps()[0].open, PATIENCE, "the first member to be handed off")
        trap.release()
        assert sender.wait(PATIENCE) == 0
    assert fleet.ended(run.record.root_id).status is Status.SUCCESS
    assert [step.status for step in run.steps()] == ["SUCCESS"] * 3
    fleet.expect({member.id: 1 for member in members})


def test_no_member_of_a_group_begins_before_all_are_sent(fleet: Fleet) -> None:
    step, stops = fleet.tasks.step, fleet.scenario.stops
    members, other = [named(step.s([], label)) for label in "abc"], named(step.s([], "z"))
    with Sender(fleet.scenario, group(members)) as sender:
        with stops.at("message", members[2].id) as waiting:
            wait_for(waiting, PATIENCE, "the sender's transaction to be stopped")
            assert other.delay().get(timeout=PATIENCE) == [
                "z"
            ]  # the workers are not idle, and find nothing of the group
            assert [fleet.scenario.log.count(each.id) for each in members] == [0] * 3
            assert [stops.count("message", each.id) for each in members] == [0] * 3
        assert sender.wait(PATIENCE) == 0
    assert fleet.ended(fleet.root_of(members[0].id)).status is Status.SUCCESS
    fleet.expect({each.id: 1 for each in (*members, other)})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_a_link_that_is_replayed_calls_its_callback_once(fleet: Fleet, victim: Victim) -> None:
    tasks = fleet.tasks
    first, second, callback = named(tasks.step.s([], "a")), named(tasks.step.s("b")), named(tasks.note.s())
    first.link(callback)
    with fleet.scenario.points.arm("after_next_link_before_result", first.id) as trap:
        with fleet.holding(second, callback):
            result = chain(first, second).delay()
            fleet.kill(victim, trap.wait())
        assert result.get(timeout=PATIENCE) == ["a", "b"]
    run = fleet.ended(first.id)
    assert run.status is Status.SUCCESS
    assert [step.task_id for step in run.steps() if step.task_name == "note"] == [callback.id]
    fleet.expect({first.id: 1, second.id: 1, callback.id: 1})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fate", FATES)
def test_a_link_and_its_callback_are_sent_together_and_once(fleet: Fleet, fate: Fate, victim: Victim) -> None:
    tasks, stops = fleet.tasks, fleet.scenario.stops
    first, second, callback = named(tasks.step.s([], "a")), named(tasks.step.s("b")), named(tasks.note.s())
    first.link(callback)
    with stops.at("message", second.id) as waiting:
        result = chain(first, second).delay()
        (server_pid,) = wait_for(waiting, PATIENCE, "the first link's transaction to be stopped")
        (body,) = [effect for effect in fleet.scenario.log.read("body") if effect.task_id == first.id]
        fleet.kill(victim, body.pid)
        assert [stops.count("message", each.id) for each in (second, callback)] == [0, 0]
        stops.decide(fate, server_pid)
    assert result.get(timeout=PATIENCE) == ["a", "b"]
    assert fleet.ended(first.id).status is Status.SUCCESS
    fleet.expect({first.id: 1 + (fate == "rolls_back"), second.id: 1, callback.id: 1})
    assert [stops.count("row", each.id) for each in (second, callback)] == [1, 1]
    assert [stops.sent_with_its_row(each.id) for each in (second, callback)] == [1, 1]


@pytest.mark.parametrize("shipping", ["ship", "ship_untyped"])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_a_link_with_the_wrong_arity_fails_the_run_once_with_one_errback(fleet: Fleet, shipping: str) -> None:
    tasks = fleet.tasks
    first, shipped, last = named(tasks.step.s([], "a")), named(getattr(tasks, shipping).s()), named(tasks.step.s("c"))
    result = chain(first, shipped, last).on_error(tasks.note.s()).delay()
    with pytest.raises(TypeError, match="positional argument"):
        result.get(timeout=PATIENCE)
    run = fleet.ended(first.id)
    assert run.status is Status.FAILED
    (errback,) = [step.task_id for step in run.steps() if step.task_name == "note"]
    assert errback is not None
    wait_for(lambda: fleet.scenario.log.count(errback) == 1, PATIENCE, "the errback to be called")
    assert run.steps()[0].status == "SUCCESS"
    fleet.expect({first.id: 1, shipped.id: 0, last.id: 0, errback: 1})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", ["in_body", "recorded_before_publish", "published"])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_a_replacement_cut_short_happens_once(fleet: Fleet, point: str, victim: Victim) -> None:
    step, replacer = fleet.tasks.step, fleet.tasks.replacer
    inner = [named(step.s(["x"], "y")), step.s("z")]
    links = [named(step.s([], "a")), named(replacer.s(json.loads(json.dumps(inner)))), named(step.s("c"))]
    stopped = links[1] if point == "in_body" else inner[0]
    with fleet.scenario.points.arm(point, stopped.id) as trap:
        with fleet.holding(inner[0]):
            result = chain(*links).delay()
            fleet.kill(victim, trap.wait())
        assert result.get(timeout=PATIENCE) == ["x", "y", "z", "c"]
    run = fleet.ended(links[0].id)
    assert run.status is Status.SUCCESS
    assert [s.status for s in run.steps()] == ["SUCCESS"] * 4
    # Its own body, and that of the last link, which has its id; on one Postgres the rows are not committed before the
    # messages are.
    replaced = 3 if point == "in_body" or fleet.broker == "postgres" else 2
    fleet.expect({links[0].id: 1, links[1].id: replaced, inner[0].id: 1, links[2].id: 1})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("fate", FATES)
def test_a_replacement_happens_as_a_whole_or_not_at_all(fleet: Fleet, fate: Fate, victim: Victim) -> None:
    step, stops = fleet.tasks.step, fleet.scenario.stops
    members = [named(step.s(["x"], label)) for label in "yz"]
    canvas = chord(members, step.s("c"))
    links = [
        named(step.s([], "a")),
        named(fleet.tasks.replacer.s(json.loads(json.dumps([canvas])))),
        named(step.s("d")),
    ]
    with stops.at("message", members[1].id) as waiting:
        result = chain(*links).delay()
        (server_pid,) = wait_for(waiting, PATIENCE, "the replacement's transaction to be stopped")
        (body,) = [effect for effect in fleet.scenario.log.read("body") if effect.task_id == links[1].id]
        fleet.kill(victim, body.pid)
        assert [stops.count("row", each.id) for each in members] == [0, 0]
        stops.decide(fate, server_pid)
    assert result.get(timeout=PATIENCE) == [["x", "y"], ["x", "z"], "c", "d"]
    run = fleet.ended(links[0].id)
    assert run.status is Status.SUCCESS
    replaced = 3 if fate == "rolls_back" else 2
    fleet.expect({links[0].id: 1, links[1].id: replaced, links[2].id: 1, **{each.id: 1 for each in members}})


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", ["after_retry_recorded", "after_retry_stored"])
@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_a_retry_cut_short_happens_once(fleet: Fleet, point: str, victim: Victim) -> None:
    tasks = fleet.tasks
    # The retry itself must not be under way when its sender's worker is killed.
    first, second = named(tasks.fickle.s([], "a", first="retry", countdown=3600)), named(tasks.step.s("b"))
    with fleet.scenario.points.arm(point, first.id) as trap:
        result = chain(first, second).delay()
        fleet.kill(victim, trap.wait())
        fleet.scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now() WHERE task_id = %s", first.id)
        assert result.get(timeout=PATIENCE) == ["a", "b"]
    run = fleet.ended(first.id)
    assert run.status is Status.SUCCESS
    assert [(s.status, s.lost) for s in run.steps()] == [("SUCCESS", 0)] * 2
    fleet.expect({first.id: 2, second.id: 1})


@pytest.mark.parametrize("fleet", ["postgres", "redis"], indirect=True)
def test_an_old_copy_that_comes_while_a_retry_waits_is_left_alone(fleet: Fleet) -> None:
    fickle = named(fleet.tasks.fickle.s([], "a", first="retry", countdown=3600))
    with sent_messages() as messages:
        result = fickle.delay()
    run = fleet.run_of(fickle.id)
    wait_for(lambda: result.state == "RETRY", PATIENCE, "the retry to be recorded")
    for _ in range(3):
        messages[fickle.id].deliver_again(fleet.application.celery)
    answer = f"fickle[{fickle.id}] is left alone: STALE"
    wait_for(lambda: fleet.occurrences(answer) == 3, PATIENCE, "three copies to be answered")
    assert run.steps()[0].status == "QUEUED"
    assert fleet.scenario.log.count(fickle.id) == 1
    fleet.scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now() WHERE task_id = %s", fickle.id)
    assert result.get(timeout=PATIENCE) == ["a"]
    assert fleet.ended(fickle.id).status is Status.SUCCESS
    fleet.expect({fickle.id: 2})
