"""Durable chains in pytest-celery's own setup, as an application would test them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from pgqrs_celery import Status
from pgqrs_celery.states import TERMINAL
from tests.acceptance.celery_setup.durable_tasks import append
from tests.support.effects import EffectLog
from tests.support.points import Points
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


@pytest.fixture
def points(tmp_path: Path) -> Points:
    return Points(tmp_path)


@pytest.fixture
def links(celery_setup: CeleryTestSetup) -> list[Any]:
    celery_setup.app.set_current()
    return [named(append.s([], "a")), named(append.s("b")), named(append.s("c"))]


def status_of(setup: CeleryTestSetup, root_id: str) -> Status:
    """Wait for the end of a run and return how it ended."""
    run: Any = setup.app.pgqrs.run_of(root_id)
    wait_for(lambda: run.status in TERMINAL, PATIENCE, "the run to end")
    return Status(run.status)


def worker_of(setup: CeleryTestSetup, pid: int) -> CeleryTestWorker:
    """Return the worker that has a process."""
    for worker in setup.worker_cluster:
        if worker.container.has(pid):
            return worker
    raise AssertionError(f"no worker has a process {pid}")


def test_every_node_of_the_setup_is_ready_without_docker(celery_setup: CeleryTestSetup) -> None:
    assert celery_setup.ready(ping=True, control=True, docker=True)
    assert len(celery_setup) == 4
    hostnames = {worker.hostname() for worker in celery_setup.worker_cluster}
    assert set(celery_setup.app.control.inspect(list(hostnames), timeout=10).ping()) == hostnames


def test_a_chain_survives_its_worker(
    celery_setup: CeleryTestSetup, links: list[Any], points: Points, tmp_path: Path
) -> None:
    with points.arm("in_body", links[1].id) as trap:
        result = chain(*links).apply_async()
        pid = trap.wait()
        victim = worker_of(celery_setup, pid)
        victim.kill()
        assert victim.container.status == "exited"
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert status_of(celery_setup, links[0].id) is Status.SUCCESS
    log = EffectLog(tmp_path / "effects.log")
    assert [log.count(link.id) for link in links] == [1, 2, 1]
    victim.restart()
    assert celery_setup.ready(ping=True, control=True, docker=True)


def test_a_chain_survives_a_broker_that_comes_back_empty(
    celery_setup: CeleryTestSetup, links: list[Any], points: Points, tmp_path: Path
) -> None:
    with points.arm("in_body", links[1].id) as trap:
        result = chain(*links).apply_async()
        trap.wait()
        celery_setup.broker.restart()
    assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
    assert status_of(celery_setup, links[0].id) is Status.SUCCESS
    log = EffectLog(tmp_path / "effects.log")
    assert [log.count(link.id) for link in links] == [1, 1, 1]
