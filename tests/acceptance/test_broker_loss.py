"""Whatever the broker loses, the ledger still knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from celery import chain

from pgqrs_celery import Status, embedded
from tests.support.fleet import Fleet
from tests.support.scenario import LOCAL, LONG_LEASE, QUEUED, Application, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

#: A port nobody listens on.
NOBODY = {
    "pgqrs+postgresql": "pgqrs+postgresql://postgres@127.0.0.1:1/postgres",  # results and ledger are elsewhere
    "redis": "redis://127.0.0.1:1/0",
    "amqp": "amqp://guest:guest@127.0.0.1:1//",
}


def test_a_queue_lost_before_anybody_read_it_is_sent_again(each_scenario: Scenario) -> None:
    with Fleet(each_scenario, size=0) as fleet:
        step = fleet.tasks.step
        chains = [[named(step.s([], "a")), named(step.s("b"))] for _ in range(20)]
        for links in chains:
            chain(*links).delay()
        assert fleet.lose_messages() == len(chains)
        fleet.size = 1
        fleet.fill()
        assert {fleet.ended(links[0].id).status for links in chains} == {Status.SUCCESS}
        fleet.expect({link.id: 1 for links in chains for link in links})


def test_one_look_at_an_empty_queue_is_enough_for_everything_it_has_lost(each_scenario: Scenario) -> None:
    # The second look would be after twenty minutes; and the first ones to be sent again fill the queue.
    with Fleet(each_scenario.with_conf(pgqrs_resend_interval=600.0), size=0) as fleet:
        tasks = [named(fleet.tasks.step.s([], str(n))) for n in range(150)]
        for task in tasks:
            task.delay()
        assert fleet.lose_messages() == len(tasks)
        assert len(each_scenario.execute("UPDATE {}.pgqrs_workflow_steps SET due_at = now()")) == len(tasks)
        fleet.size = 1
        fleet.fill()
        unfinished = "SELECT FROM {}.pgqrs_workflows WHERE status <> 'SUCCESS'"
        wait_for(lambda: not each_scenario.execute(unfinished), PATIENCE, "all the runs to end")
        fleet.expect({task.id: 1 for task in tasks})
        fleet.expect({task.id: 1 for task in tasks}, kind="sent")


def test_a_broker_emptied_again_and_again_under_constant_production_loses_nothing(each_scenario: Scenario) -> None:
    with Fleet(each_scenario.with_conf(**LONG_LEASE, pgqrs_resend_interval_max=2.0), size=1) as fleet:
        step, produced = fleet.tasks.step, threading.Event()
        chains = [[named(step.s([], "a")), named(step.s("b")), named(step.s("c"))] for _ in range(60)]

        def produce() -> None:
            for links in chains[2:]:
                chain(*links).delay()
            produced.set()

        producer = threading.Thread(target=produce)
        with ExitStack() as busy:  # both processes, until something is lost that waits for them
            traps = [busy.enter_context(fleet.scenario.points.arm("in_body", first.id)) for first, *_ in chains[:2]]
            for links in chains[:2]:
                chain(*links).delay()
            for trap in traps:
                trap.wait()
            producer.start()
            wait_for(fleet.lose_messages, PATIENCE, "a message to be lost")
        while not produced.wait(0.05):
            fleet.lose_messages()
        producer.join()
        assert {fleet.ended(links[0].id).status for links in chains} == {Status.SUCCESS}
        fleet.expect({link.id: 1 for links in chains for link in links})


def test_a_lost_message_is_told_from_one_that_waits_in_a_long_queue(each_scenario: Scenario) -> None:
    with Fleet(each_scenario.with_conf(**LONG_LEASE), size=0, options={"concurrency": 1}) as fleet:
        step, points, log = fleet.tasks.step, fleet.scenario.points, fleet.scenario.log
        lost, first, *waiting = [named(step.s([], "a")) for _ in range(6)]
        lost.delay()
        assert fleet.lose_messages() == 1
        with points.arm("in_body", first.id) as trap:
            for later in (first, *waiting):
                later.delay()
            fleet.size = 1
            fleet.fill()
            trap.wait()  # the only process is busy: the queue stays as long as it is
            older = "UPDATE {}.pgqrs_workflow_steps SET sent_at = sent_at - interval '2 minutes' WHERE task_id = %s"
            assert len(fleet.scenario.execute(older, lost.id)) == 1
            wait_for(lambda: log.count(lost.id, "sent") == 1, PATIENCE, "the lost message to be sent by the relay")
            assert fleet.waiting() > 1
            assert [log.count(later.id, "sent") for later in (first, *waiting)] == [0] * 5
        assert {fleet.ended(each.id).status for each in (lost, first, *waiting)} == {Status.SUCCESS}
        fleet.expect({each.id: 1 for each in (lost, first, *waiting)})


def test_what_is_sent_while_the_broker_is_away_is_accepted_and_sent_later(each_scenario: Scenario) -> None:
    with Fleet(each_scenario, size=1) as fleet:
        scheme = each_scenario.broker.partition(":")[0]
        client = Application(replace(each_scenario, broker=NOBODY[scheme]))
        step = client.tasks.step
        links = [named(step.s([], "a")), named(step.s("b"))]
        result = chain(*links).delay()
        assert result.get(timeout=PATIENCE) == ["a", "b"]
        assert fleet.ended(links[0].id).status is Status.SUCCESS
        fleet.expect({link.id: 1 for link in links})


@dataclass(frozen=True, slots=True)
class MortalBroker:
    """A scenario with a broker that can be taken away: a second Postgres, or one that forgets everything."""

    scenario: Scenario
    go: Callable[[], Any]
    come_back: Callable[[], Any]


@pytest.fixture(params=["postgres", "redis"])
def mortal_broker(request: pytest.FixtureRequest, scenario: Scenario) -> MortalBroker:
    """A scenario with a broker of the test's own."""
    if request.param == "redis":
        redis: embedded.RedisServer = request.getfixturevalue("own_redis")
        return MortalBroker(scenario.using(redis.url, None), redis.kill, redis.start)
    if request.param == "rabbitmq":
        rabbitmq, url = request.getfixturevalue("rabbitmq_server"), request.getfixturevalue("rabbitmq_url")
        vhost = f"/vhosts/{url.rpartition('/')[2]}"
        go, come_back = partial(rabbitmq.request, "DELETE", vhost), partial(rabbitmq.request, "PUT", vhost)
        return MortalBroker(scenario.using(url, None), go, come_back)
    server: embedded.PostgresServer = request.getfixturevalue("own_postgres")
    there = scenario.elsewhere(server.dsn())
    Application(there).pgqrs.install()
    return MortalBroker(scenario.using(there.broker, None), server.stop, server.start)


@pytest.mark.parametrize("point", ["in_body", "recorded_before_publish"])
def test_a_broker_that_dies_in_the_middle_of_a_chain_does_not_stop_it(mortal_broker: MortalBroker, point: str) -> None:
    with Fleet(mortal_broker.scenario.with_conf(**LONG_LEASE, **QUEUED), size=1) as fleet:
        step = fleet.tasks.step
        links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
        with fleet.scenario.points.arm(point, links[1].id) as trap:
            result = chain(*links).delay()
            trap.wait()
            mortal_broker.go()
            trap.release()
            wait_for(lambda: fleet.logged("the broker does not take messages"), PATIENCE, "the link to be refused")
            mortal_broker.come_back()
            assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert fleet.ended(links[0].id).status is Status.SUCCESS
        fleet.expect({link.id: 1 for link in links})


def test_a_process_that_goes_on_by_itself_needs_no_broker(mortal_broker: MortalBroker) -> None:
    conf = {**LOCAL, **LONG_LEASE, "task_send_sent_event": True}
    options = {"arguments": ["-E"]}
    with Fleet(mortal_broker.scenario.with_conf(**conf), size=1, options=options) as fleet:
        step = fleet.tasks.step
        links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
        with fleet.scenario.points.arm("in_body", links[1].id) as trap:
            result = chain(*links).delay()
            trap.wait()
            mortal_broker.go()
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert fleet.logged("the broker does not take a task-sent event")
        assert fleet.logged("the broker does not take task events")
        assert [(s.status, s.attempt) for s in fleet.ended(links[0].id).steps()] == [("SUCCESS", 1)] * 3
        mortal_broker.come_back()
        fleet.expect({link.id: 1 for link in links})


@pytest.mark.rabbitmq
@pytest.mark.parametrize("mortal_broker", ["rabbitmq"], indirect=True)
def test_what_has_no_message_is_not_cancelled_when_the_broker_is_lost(mortal_broker: MortalBroker) -> None:
    conf = {**LOCAL, **LONG_LEASE, "worker_cancel_long_running_tasks_on_connection_loss": True}
    with Fleet(mortal_broker.scenario.with_conf(**conf), size=1) as fleet:
        late = fleet.tasks.late
        links = [named(late.s([], "a")), named(late.s("b")), named(late.s("c"))]
        with fleet.scenario.points.arm("in_body", links[1].id) as trap:
            result = chain(*links).delay()
            trap.wait()
            mortal_broker.go()
            what = "the worker to cancel what it can no longer acknowledge"
            wait_for(lambda: fleet.logged("cannot be acknowledged"), PATIENCE, what)
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert [(s.status, s.attempt) for s in fleet.ended(links[0].id).steps()] == [("SUCCESS", 1)] * 3
        mortal_broker.come_back()
        fleet.expect({link.id: 1 for link in links})
