"""A process that goes on with the next link itself: what it may go on with, and who sees it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import Any

import pytest
from celery import chain
from celery.contrib.testing.worker import start_worker
from celery.exceptions import TaskRevokedError
from celery.worker.control import Panel

from pgqrs_celery import Status
from pgqrs_celery.exceptions import PoisonedStep
from tests.acceptance.test_leases import RENEWED
from tests.support.fleet import Fleet, Victim
from tests.support.proxy import Proxy
from tests.support.scenario import LOCAL, LONG_LEASE, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


@pytest.fixture(params=["local", "local_redis"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """Two workers whose processes go on, shared with other tests; on one Postgres, and with Redis for the rest."""
    shared: Fleet = request.getfixturevalue(f"{request.param}_fleet")
    shared.fill()
    return shared


@pytest.fixture
def own_fleet(scenario: Scenario) -> Iterator[Fleet]:
    """The same with one worker, which no test has told what it remembers."""
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE), size=1) as fleet:
        yield fleet


def abc(fleet: Fleet) -> list[Any]:
    """Return the links of a chain whose result is ``abc``."""
    step = fleet.tasks.step
    return [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]


def sent(fleet: Fleet, *links: Any) -> list[int]:
    """Return how many messages of each link there have been."""
    if fleet.scenario.on_one_postgres:
        return [fleet.scenario.stops.count("message", link.id) for link in links]
    return [fleet.occurrences(f"[{link.id}] received") for link in links]


def pids(fleet: Fleet, *links: Any) -> list[int]:
    """Return who has executed the links, in their order."""
    effects = fleet.scenario.log.read("body")
    return [effect.pid for link in links for effect in effects if effect.task_id == link.id]


@pytest.mark.parametrize(
    "fleet",
    ["local", "local_redis", pytest.param("local_rabbitmq", marks=pytest.mark.rabbitmq)],
    indirect=True,
)
def test_one_process_executes_a_chain_with_one_message(fleet: Fleet) -> None:
    links = abc(fleet)
    assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
    run = fleet.ended(links[0].id)
    assert run.status is Status.SUCCESS
    assert [(s.status, s.attempt, s.lost) for s in run.steps()] == [("SUCCESS", 1, 0)] * 3
    assert sent(fleet, *links) == [1, 0, 0]
    assert len(set(pids(fleet, *links))) == 1
    fleet.expect({link.id: 1 for link in links})


def test_every_link_has_its_result_and_sees_its_own_request(fleet: Fleet) -> None:
    app = fleet.application.celery
    links = [named(app.tasks["step"].s([], "a")), *(named(app.tasks["show"].s()) for _ in range(2))]
    shown = chain(*links).delay().get(timeout=PATIENCE)
    before = app.AsyncResult(links[1].id).get(timeout=PATIENCE)
    assert app.AsyncResult(links[0].id).get(timeout=PATIENCE) == ["a"]
    for request, own, parent in ((before, links[1], links[0]), (shown, links[2], links[1])):
        assert (request["id"], request["parent_id"], request["root_id"]) == (own.id, parent.id, links[0].id)
        assert (request["correlation_id"], request["retries"], request["redelivered"]) == (own.id, 0, False)
        assert request["announced"] == own.id  # who hears of messages has a say in those that are not sent
        assert request["routing_key"] == fleet.queue
        assert request["hostname"] in [worker.hostname for worker in fleet.workers]
    assert sent(fleet, *links) == [1, 0, 0]


def test_a_stretch_that_has_lasted_long_enough_goes_through_the_queue(scenario: Scenario) -> None:
    with Fleet(scenario.with_conf(**LONG_LEASE, pgqrs_local_continuation=0.000001), size=1) as fleet:
        links = abc(fleet)
        assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
        fleet.ended(links[0].id)
        assert sent(fleet, *links) == [1, 1, 1]


@pytest.mark.parametrize(
    ("pool", "messages"),
    [
        ("threads", [1, 0, 0]),
        ("solo", [1, 0, 0]),
        # These have no event loop of Celery's, and so nobody who could forbid it.
        pytest.param("gevent", [1, 1, 1], marks=pytest.mark.skipif(not find_spec("gevent"), reason="no gevent")),
    ],
)
def test_threads_go_on_like_processes(scenario: Scenario, pool: str, messages: list[int]) -> None:
    options = {"pool": pool, "concurrency": 1}
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE), size=1, options=options) as fleet:
        links = abc(fleet)
        assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
        fleet.ended(links[0].id)
        assert sent(fleet, *links) == messages


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("slowly", {}),
        ("limited", {}),
        ("note", {"time_limit": 60}),
        ("note", {"soft_time_limit": 60}),
        ("note", {"expires": 3600}),
        ("note", {"priority": 5}),
        ("note", {"queue": "other"}),
        ("note", {"countdown": 0.01}),
    ],
    ids=str,
)
def test_what_concerns_the_main_process_goes_through_the_queue(
    own_fleet: Fleet, task: str, options: dict[str, Any]
) -> None:
    own_fleet.application.celery.control.add_consumer("other", reply=True)
    first, second = named(own_fleet.tasks.note.s()), named(getattr(own_fleet.tasks, task).si())
    chain(first, second.set(**options)).delay().get(timeout=PATIENCE)
    own_fleet.ended(first.id)
    assert sent(own_fleet, first, second) == [1, 1]


@pytest.mark.parametrize(
    ("task", "options"), [("limited", {}), ("note", {"time_limit": 60}), ("note", {"soft_time_limit": 60})], ids=str
)
def test_no_link_follows_into_the_time_that_another_may_take(
    own_fleet: Fleet, task: str, options: dict[str, Any]
) -> None:
    first, second = named(getattr(own_fleet.tasks, task).s()), named(own_fleet.tasks.note.si())
    chain(first.set(**options), second).delay().get(timeout=PATIENCE)
    own_fleet.ended(first.id)
    assert sent(own_fleet, first, second) == [1, 1]


@pytest.mark.parametrize("how", ["revoke", "rate_limit", "time_limit", "cancel_consumer"])
def test_nothing_goes_on_while_remote_control_wants_something(own_fleet: Fleet, how: str) -> None:
    control, links = own_fleet.application.celery.control, abc(own_fleet)
    with own_fleet.scenario.points.arm("in_body", links[0].id) as trap:
        result = chain(*links).delay()
        trap.wait()
        match how:
            case "revoke":
                control.revoke(links[2].id, reply=True)
            case "rate_limit":
                control.rate_limit("note", "1000/s", reply=True)
            case "time_limit":
                control.time_limit("note", hard=3600, reply=True)
            case "cancel_consumer":
                control.cancel_consumer(own_fleet.queue, reply=True)
        wait_for(lambda: own_fleet.logged("local continuation is off"), PATIENCE, "the worker to take note")
    if how == "cancel_consumer":
        wait_for(lambda: sent(own_fleet, links[1]) == [1], PATIENCE, "the second link to be sent")
        control.add_consumer(own_fleet.queue, reply=True)
    if how == "revoke":
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
    else:
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    own_fleet.ended(links[0].id)
    assert sent(own_fleet, links[1]) == [1]
    own_fleet.expect({links[0].id: 1, links[1].id: 1, links[2].id: how != "revoke"})


@pytest.mark.parametrize("how", ["revoke", "terminate", "cancel"])
def test_what_a_process_has_gone_on_with_can_be_ended_by_force(own_fleet: Fleet, how: str) -> None:
    links, control = abc(own_fleet), own_fleet.application.celery.control
    with own_fleet.scenario.points.arm("in_body", links[1].id) as trap:
        result = chain(*links).delay()
        pid = trap.wait()
        run = own_fleet.run_of(links[0].id)
        if how == "revoke":
            control.revoke(links[1].id, terminate=True)
        elif how == "terminate":
            control.terminate(links[1].id)
        else:
            run.cancel(terminate=True)
        wait_for(lambda: not own_fleet.workers[0].has(pid), PATIENCE, "the process to end")
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
    assert own_fleet.ended(links[0].id).status is Status.CANCELLED
    assert {s.task_id: s.status for s in run.steps()} == {links[0].id: "SUCCESS", links[1].id: "CANCELLED"}
    assert own_fleet.application.celery.AsyncResult(links[0].id).state == "SUCCESS"
    own_fleet.expect({links[0].id: 1, links[1].id: 1, links[2].id: 0})


def test_a_link_that_is_done_with_cannot_be_ended_by_force(own_fleet: Fleet) -> None:
    links, app = abc(own_fleet), own_fleet.application.celery
    with own_fleet.scenario.points.arm("in_body", links[1].id) as trap:
        result = chain(*links).delay()
        trap.wait()
        app.control.revoke(links[0].id, terminate=True, reply=True)
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert app.AsyncResult(links[0].id).state == "SUCCESS"
    own_fleet.expect({link.id: 1 for link in links})


@pytest.mark.parametrize("how", ["pause", "cancel"])
def test_a_run_that_is_paused_or_cancelled_does_not_go_on(fleet: Fleet, how: str) -> None:
    links = abc(fleet)
    with fleet.scenario.points.arm("in_body", links[0].id) as trap:
        result = chain(*links).delay()
        trap.wait()
        run = fleet.run_of(links[0].id)
        if how == "pause":
            run.pause()
        else:
            run.cancel()
    if how == "cancel":
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
        assert fleet.ended(links[0].id).status is Status.CANCELLED
        fleet.expect({links[0].id: 1, links[1].id: 0, links[2].id: 0})
        return
    wait_for(lambda: len(run.steps()) == 2, PATIENCE, "the next link to be recorded")
    assert [s.status for s in run.steps()] != ["SUCCESS", "RUNNING"]
    fleet.expect({links[1].id: 0})
    run.unpause()
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    fleet.ended(links[0].id)
    fleet.expect({link.id: 1 for link in links})


def test_the_lease_of_what_a_process_has_gone_on_with_is_renewed(brief_local_fleet: Fleet) -> None:
    fleet = brief_local_fleet
    fleet.fill()
    links, scenario = abc(fleet), fleet.scenario
    with scenario.points.arm("in_body", links[1].id) as trap:
        result = chain(*links).delay()
        trap.wait()
        # The lease is three seconds: three later it must have been renewed twice.
        then = datetime.now(UTC) - timedelta(seconds=11 - 6)
        wait_for(lambda: scenario.execute(RENEWED, links[1].id, then), PATIENCE, "the lease to be renewed")
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert [(s.attempt, s.lost) for s in fleet.ended(links[0].id).steps()] == [(1, 0)] * 3
    fleet.expect({link.id: 1 for link in links})


def test_inspection_shows_what_a_process_is_at(fleet: Fleet) -> None:
    links = abc(fleet)
    with fleet.scenario.points.arm("in_body", links[1].id) as trap:
        result = chain(*links).delay()
        worker = fleet.owner(trap.wait())
        inspect = fleet.application.celery.control.inspect([worker.hostname], timeout=PATIENCE, limit=1)
        (shown,) = inspect.active()[worker.hostname]
        assert (shown["id"], shown["name"], shown["gone_on_from"]) == (links[1].id, "step", links[0].id)
        found = inspect.query_task([links[1].id, links[2].id])[worker.hostname]
        assert {task_id: (state, info["id"]) for task_id, (state, info) in found.items()} == {
            links[1].id: ("active", links[1].id)
        }
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]


def test_what_a_thread_is_at_is_not_taken_for_what_others_of_its_process_are_at(scenario: Scenario) -> None:
    options = {"pool": "threads", "concurrency": 2}
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE), size=1, options=options) as fleet:
        links, other, points = abc(fleet), named(fleet.tasks.step.s([], "x")), fleet.scenario.points
        with points.arm("in_body", links[1].id) as trap, points.arm("in_body", other.id) as another:
            result, another_result = chain(*links).delay(), other.delay()
            trap.wait()
            another.wait()
            hostname = fleet.workers[0].hostname
            inspect = fleet.application.celery.control.inspect([hostname], timeout=PATIENCE, limit=1)
            assert inspect.query_task([links[1].id]) == {hostname: {}}
        assert (result.get(timeout=PATIENCE), another_result.get(timeout=PATIENCE)) == (["a", "b", "c"], ["x"])


@pytest.mark.parametrize("victim", ["child", "worker"])
@pytest.mark.parametrize("moment", ["in its body", "while it is taken", "before its body"])
def test_no_lease_is_waited_for_when_its_process_is_killed(scenario: Scenario, moment: str, victim: Victim) -> None:
    with Fleet(scenario.with_conf(**LOCAL, pgqrs_lease=3600.0)) as fleet:
        links = abc(fleet)
        if moment == "while it is taken":
            with fleet.scenario.stops.at("row", links[1].id) as waiting:
                result = chain(*links).delay()
                wait_for(waiting, PATIENCE, "the transaction to be stopped")
                (pid,) = pids(fleet, links[0])
                fleet.kill(victim, pid)  # and then the transaction commits
        else:
            point = "in_body" if moment == "in its body" else "delivered_before_acquire"
            with fleet.scenario.points.arm(point, links[1].id) as trap:
                result = chain(*links).delay()
                fleet.kill(victim, trap.wait())
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        lost = {s.task_id: s.lost for s in fleet.ended(links[0].id).steps()}
        assert lost == {links[0].id: 0, links[1].id: 1, links[2].id: 0}
        fleet.expect({links[0].id: 1, links[1].id: 1 + (moment == "in its body"), links[2].id: 1})


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_what_a_process_was_handed_is_not_waited_for_when_it_is_killed(
    scenario: Scenario, redis_url: str, victim: Victim
) -> None:
    hour = {"pgqrs_lease": 3600.0, "pgqrs_resend_interval": 3600.0, "pgqrs_resend_interval_max": 3600.0}
    with Fleet(scenario.using(None, redis_url).with_conf(**LOCAL, **hour)) as fleet:
        links = abc(fleet)
        with fleet.scenario.points.arm("after_next_link_before_result", links[0].id) as trap:
            result = chain(*links).delay()
            fleet.kill(victim, trap.wait())
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert fleet.application.celery.AsyncResult(links[0].id).get(timeout=PATIENCE) == ["a"]
        assert [(s.attempt, s.lost) for s in fleet.ended(links[0].id).steps()] == [(1, 0)] * 3
        fleet.expect({link.id: 1 for link in links})


def test_a_link_that_ends_its_process_is_tried_again_without_waiting_for_a_lease(scenario: Scenario) -> None:
    with Fleet(scenario.with_conf(**LOCAL, pgqrs_lease=3600.0)) as fleet:
        tasks = fleet.tasks
        links = [named(tasks.step.s([], "a")), named(tasks.quit.s("b")), named(tasks.step.s("c"))]
        assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
        steps = {s.task_id: (s.status, s.attempt, s.lost) for s in fleet.ended(links[0].id).steps()}
        assert steps[links[1].id] == ("SUCCESS", 2, 1)
        fleet.expect({links[0].id: 1, links[1].id: 2, links[2].id: 1})


def test_a_link_that_kills_its_process_every_time_is_given_up(scenario: Scenario) -> None:
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE, pgqrs_max_lost=3), size=1) as fleet:
        first, deadly, last = named(fleet.tasks.note.s()), named(fleet.tasks.deadly.s()), named(fleet.tasks.note.s())
        result = chain(first, deadly, last).delay()
        with pytest.raises(PoisonedStep, match="killed its worker 3 times"):
            result.get(timeout=PATIENCE)
        assert fleet.ended(first.id).status is Status.FAILED
        fleet.expect({first.id: 1, deadly.id: 3, last.id: 0})


@pytest.mark.parametrize("fleet", ["local_redis"], indirect=True)
def test_no_link_waits_for_a_result_that_the_backend_does_not_take(fleet: Fleet) -> None:
    links = abc(fleet)
    with fleet.scenario.points.arm("after_next_link_before_result", links[0].id) as trap:
        result = chain(*links).delay()
        trap.wait()
        wait_for(lambda: pids(fleet, links[2]), PATIENCE, "somebody else to go on with the chain")
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert fleet.application.celery.AsyncResult(links[0].id).get(timeout=PATIENCE) == ["a"]
    assert fleet.ended(links[0].id).status is Status.SUCCESS
    first, second, _ = pids(fleet, *links)
    assert first != second
    fleet.expect({link.id: 1 for link in links})


def test_links_that_leave_no_result_go_on(fleet: Fleet) -> None:
    links = [link.set(ignore_result=True) for link in abc(fleet)]
    chain(*links).delay()
    wait_for(lambda: fleet.application.pgqrs.run_of(links[0].id), PATIENCE, "the run")
    run = fleet.ended(links[0].id)
    assert run.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert [(s.status, s.attempt, s.open) for s in run.steps()] == [("SUCCESS", 1, False)] * 3
    assert sent(fleet, *links) == [1, 0, 0]
    assert fleet.application.celery.AsyncResult(links[2].id).state == "PENDING"
    fleet.expect({link.id: 1 for link in links})


@pytest.mark.parametrize("first", ["fail", "retry"])
def test_a_link_that_fails_or_is_retried_goes_on_after_that(fleet: Fleet, first: str) -> None:
    tasks = fleet.tasks
    links = [named(tasks.step.s([], "a")), named(tasks.fickle.s("b", first=first)), named(tasks.step.s("c"))]
    result = chain(*links).delay()
    if first == "fail":
        with pytest.raises(ValueError, match="the first execution fails"):
            result.get(timeout=PATIENCE)
        run = fleet.ended(links[0].id)
        assert run.status is Status.FAILED
        run.resume()
        assert run.get(timeout=PATIENCE) == ["a", "b", "c"]
    else:
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert fleet.ended(links[0].id).status is Status.SUCCESS
    fleet.expect({links[0].id: 1, links[1].id: 2, links[2].id: 1})


def test_a_worker_that_stops_warmly_leaves_the_next_link_to_others(scenario: Scenario) -> None:
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE)) as fleet:
        links = abc(fleet)
        with fleet.scenario.points.arm("in_body", links[0].id) as trap:
            result = chain(*links).delay()
            leaving = fleet.owner(trap.wait())
            leaving.signal(signal.SIGTERM)
            wait_for(lambda: "Warm shutdown" in leaving.output(), PATIENCE, "the worker to stop")
        assert leaving.wait_exit() == 0
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        first, second, third = pids(fleet, *links)
        assert first != second == third
        fleet.ended(links[0].id)
        assert sent(fleet, *links) == [1, 1, 0]
        fleet.expect({link.id: 1 for link in links})


def test_a_link_whose_taking_was_answered_too_late_is_executed_once(scenario: Scenario, proxy: Proxy) -> None:
    behind = scenario.elsewhere(f"postgresql://postgres@/postgres?host={proxy.directory}")
    with Fleet(behind.with_conf(**LOCAL, **LONG_LEASE), size=1) as fleet:
        links = abc(fleet)
        with fleet.scenario.points.arm("in_body", links[1].id) as trap:
            result = chain(*links).delay()
            trap.wait()
            proxy.lose_answer_to(b"pgqrs_units.go_on")  # prepared by now: this is its second execution
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert proxy.lost == 1
        assert [(s.status, s.attempt) for s in fleet.ended(links[0].id).steps()] == [("SUCCESS", 1)] * 3
        assert sent(fleet, *links) == [1, 0, 0]
        fleet.expect({link.id: 1 for link in links})


def test_a_second_worker_of_a_process_finds_celery_s_own_commands(scenario: Scenario) -> None:
    revoke = Panel.data["revoke"]
    app = Fleet(scenario.with_conf(**LOCAL), size=0).application.celery
    for _ in range(2):
        with start_worker(app, perform_ping_check=False, shutdown_timeout=PATIENCE):
            wait_for(lambda: Panel.data["revoke"] is not revoke, PATIENCE, "the worker to have commands of its own")
        assert Panel.data["revoke"] is revoke
