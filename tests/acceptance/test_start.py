"""A worker starts when its ledger is there, and says what to do when it is not."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from celery import chain

from pgqrs_celery import embedded
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for
from tests.support.worker_process import WorkerProcess

WAITING = "waiting for the database, next try in"


@pytest.fixture
def worker(scenario: Scenario) -> Iterator[WorkerProcess]:
    """A worker of the test's scenario that has not been started."""
    worker = WorkerProcess(scenario, "early")
    yield worker
    worker.close()


def test_a_worker_waits_for_a_database_that_is_not_there_yet(
    scenario: Scenario, own_postgres: embedded.PostgresServer
) -> None:
    with Fleet(scenario.elsewhere(own_postgres.dsn()), size=0) as fleet:
        own_postgres.stop()
        worker = WorkerProcess(fleet.scenario, "early")
        worker.start()
        fleet.workers.append(worker)
        wait_for(lambda: worker.output().count(WAITING) >= 2, PATIENCE, "the worker to say that it waits, twice")
        assert worker.alive
        own_postgres.start()
        worker.wait_ready()
        links = [named(fleet.tasks.step.s([], "a")), named(fleet.tasks.step.s("b"))]
        assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b"]
        fleet.expect({link.id: 1 for link in links})


def test_a_worker_that_waits_for_the_database_can_be_stopped(
    scenario: Scenario, own_postgres: embedded.PostgresServer
) -> None:
    own_postgres.stop()
    worker = WorkerProcess(scenario.elsewhere(own_postgres.dsn()), "early")
    try:
        worker.start()
        wait_for(lambda: WAITING in worker.output(), PATIENCE, "the worker to say that it waits")
        worker.signal(signal.SIGTERM)
        assert worker.wait_exit() != 0
    finally:
        worker.close()


def test_without_the_schema_a_worker_ends_and_says_what_to_run(scenario: Scenario, worker: WorkerProcess) -> None:
    scenario.execute("DROP SCHEMA {} CASCADE")
    worker.start()
    assert worker.wait_exit() != 0
    assert "celery -A your_app pgqrs install" in worker.output()
    assert "ready." not in worker.output()


def test_with_an_older_schema_a_worker_ends_and_says_what_to_run(scenario: Scenario, worker: WorkerProcess) -> None:
    newest = "DELETE FROM {}.pgqrs_migrations WHERE version = (SELECT max(version) FROM {}.pgqrs_migrations)"
    assert len(scenario.execute(newest.replace("{}", scenario.schema))) == 1
    worker.start()
    assert worker.wait_exit() != 0
    assert "celery -A your_app pgqrs install" in worker.output()
    assert "ready." not in worker.output()
