"""An app with its ledger in a schema of the test's own, and a real worker in a thread of the test's process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from celery import Celery, signals
from celery.contrib.testing.worker import start_worker
from celery.worker import state

from pgqrs_celery import Pgqrs, WorkflowRun, embedded
from pgqrs_celery.states import TERMINAL
from tests.support.waiting import wait_for

#: What makes waits and recoveries quick; a lease is still long enough for a busy machine.
QUICK = {
    "pgqrs_lease": 5.0,
    "pgqrs_relay_interval": 1.0,
    "pgqrs_watch_interval": 0.2,
    "pgqrs_resend_interval": 2.0,
    "worker_hijack_root_logger": False,
}

Working = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="session", autouse=True)
def forget_results(redis_server: embedded.RedisServer) -> Iterator[None]:
    """Let go of results while their Redis is there: one that goes later tries for long to take its leave of it."""
    yield
    gc.collect()


@pytest.fixture
def new_pgqrs(database_dsn: str, installed_schema: str, redis_url: str) -> Iterator[Callable[..., Pgqrs]]:
    """Make apps with a ledger; settings as keyword arguments."""
    made: list[Pgqrs] = []

    def new(**conf: Any) -> Pgqrs:
        app = Celery("functions", broker=redis_url, backend=redis_url, set_as_current=False)
        app.conf.update(
            QUICK, pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema, broker_connection_retry_on_startup=True
        )
        app.conf.update(conf)
        made.append(Pgqrs(app))
        return made[-1]

    yield new
    for pgqrs in made:
        pgqrs.ledger.database.close()
        pgqrs.app.close()


@pytest.fixture
def pgqrs(new_pgqrs: Callable[..., Pgqrs]) -> Pgqrs:
    """A ledger, its app's broker and its result backend; define workflows on it, then start `working()`."""
    return new_pgqrs()


@pytest.fixture
def working(pgqrs: Pgqrs) -> Working:
    """Start a worker for the length of a `with` block."""

    @contextmanager
    def working() -> Iterator[Any]:
        with start_worker(
            pgqrs.app, pool="threads", concurrency=4, perform_ping_check=False, shutdown_timeout=30.0, loglevel="INFO"
        ) as worker:
            stopped = threading.Event()
            signals.worker_shutdown.connect(lambda **_: stopped.set(), weak=False, sender=worker)
            try:
                yield worker
            finally:
                state.should_stop = 0  # warmly: what runs is finished, and everything is given back
                wait_for(stopped.is_set, 60.0, "the worker to stop")
                state.should_stop = None

    return working


@pytest.fixture
def inner(pgqrs: Pgqrs) -> Callable[[WorkflowRun], dict[str, str]]:
    """Return the status of a run's inner steps by step id."""

    def inner(run: WorkflowRun) -> dict[str, str]:
        return {step.step_id: step.status for step in run.steps() if step.kind == "inner"}

    return inner


def ended(run: WorkflowRun, timeout: float = 60.0) -> WorkflowRun:
    """Wait until a run has ended."""
    wait_for(lambda: run.status in TERMINAL, timeout, f"run {run.id} to end")
    return run
