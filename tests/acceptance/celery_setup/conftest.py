"""pytest-celery's fixtures, over local processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from celery import Celery
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestWorker,
    CeleryWorkerCluster,
)

from pgqrs_celery import Pgqrs, embedded
from tests.acceptance.celery_setup import app as app_module
from tests.acceptance.celery_setup import durable_tasks
from tests.support.nodes import RedisNode, WorkerNode
from tests.support.scenario import LONG_LEASE, QUICK


@pytest.fixture
def docker_client() -> None:
    """Nothing here may ask for docker."""
    pytest.fail("docker was asked for")


@pytest.fixture
def celery_broker_cluster(own_redis: embedded.RedisServer) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(CeleryTestBroker(RedisNode(own_redis, 0)))


@pytest.fixture
def celery_backend_cluster(redis_server: embedded.RedisServer) -> CeleryBackendCluster:
    """The results are in another server than the messages, so that a test may lose those."""
    return CeleryBackendCluster(CeleryTestBackend(RedisNode(redis_server, 4093)))


@pytest.fixture
def celery_setup_app(celery_setup_app: Celery, database_dsn: str, schema: str) -> Celery:
    """The client's app, with a ledger; pytest-celery copies what is changed here into the workers' configuration."""
    queue = WorkerNode.worker_queue()
    celery_setup_app.conf.update({**QUICK, **LONG_LEASE, "task_default_queue": queue})
    celery_setup_app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=schema)
    Pgqrs(celery_setup_app).install()
    return celery_setup_app


@pytest.fixture
def default_worker_app_module() -> ModuleType:
    return app_module


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[ModuleType]) -> set[ModuleType]:
    return {*default_worker_tasks, durable_tasks}


@pytest.fixture
def default_worker_container_cls() -> type[WorkerNode]:
    return WorkerNode


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {**default_worker_env, durable_tasks.DIRECTORY: str(tmp_path)}


@pytest.fixture
def worker_node(
    tmp_path_factory: pytest.TempPathFactory,
    default_worker_initial_content: dict[str, bytes],
    default_worker_env: dict[str, str],
    default_worker_command: list[str],
    default_worker_cls: type[CeleryTestWorker],
    celery_setup_app: Celery,
) -> Callable[[], CeleryTestWorker]:
    """Make a worker node that is starting."""

    def make() -> CeleryTestWorker:
        directory = tmp_path_factory.mktemp("worker")
        node = WorkerNode(directory, default_worker_initial_content, default_worker_env, default_worker_command)
        return default_worker_cls(container=node, app=celery_setup_app)

    return make


@pytest.fixture
def celery_worker_cluster(worker_node: Callable[[], CeleryTestWorker]) -> Iterator[CeleryWorkerCluster]:
    """Two workers, so that one can be killed."""
    workers = [worker_node(), worker_node()]
    try:
        cluster = CeleryWorkerCluster(*workers)
        assert cluster.ready()
        yield cluster
    finally:
        for worker in workers:
            worker.teardown()
