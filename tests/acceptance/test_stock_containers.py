"""The same promises with the brokers as pytest-celery's stock containers run them, where there is a docker engine."""

from __future__ import annotations

from dataclasses import replace

import docker
import pytest
from celery import chain
from docker.errors import DockerException
from pytest_celery import CeleryTestBroker

from pgqrs_celery import Status
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skip where no docker engine answers."""
    try:
        docker.from_env().ping()
    except DockerException as error:
        pytest.skip(f"no docker engine answers: {error}")


@pytest.fixture(params=["celery_redis_broker", "celery_rabbitmq_broker"])
def stock_broker(request: pytest.FixtureRequest, docker_engine: None) -> CeleryTestBroker:
    """One of pytest-celery's own broker nodes, a container."""
    broker: CeleryTestBroker = request.getfixturevalue(request.param)
    assert broker.ready()
    return broker


@pytest.mark.docker
@pytest.mark.timeout(600)  # the first time, docker has to fetch the image
def test_a_chain_survives_its_worker_and_the_loss_of_its_queue(
    scenario: Scenario, stock_broker: CeleryTestBroker
) -> None:
    with Fleet(replace(scenario, broker=stock_broker.config()["host_url"])) as fleet:
        step = fleet.tasks.step
        links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
        waiting = [named(step.s([], str(n))) for n in range(20)]
        with fleet.scenario.points.arm("in_body", links[1].id) as trap:
            result = chain(*links).delay()
            victim = trap.wait()
            # Nobody must have one of the others in its body when it is killed.
            for worker in fleet.workers:
                worker.freeze()
            for each in waiting:
                each.delay()
            assert fleet.lose_messages() > 0
            survivors = [worker for worker in fleet.workers if not worker.has(victim)]
            fleet.kill("worker", victim)
            for worker in survivors:
                worker.thaw()
            assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert {fleet.ended(each.id).status for each in (links[0], *waiting)} == {Status.SUCCESS}
        fleet.expect({links[0].id: 1, links[1].id: 2, links[2].id: 1, **{each.id: 1 for each in waiting}})
