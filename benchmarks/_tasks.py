"""The app the benchmark's workers and drivers share; its URLs come from the environment."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

BROKER = "PGQRS_BENCH_BROKER"
BACKEND = "PGQRS_BENCH_BACKEND"


def make_app(broker: str, backend: str) -> Celery:
    """Return an app with the benchmark's tasks."""
    app = Celery("benchmarks._tasks", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=4)
    for function in (add, total):
        app.task(name=function.__name__)(function)
    app.finalize()
    return app


def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


def total(numbers: list[Any]) -> int:
    """Return the sum."""
    return sum(numbers)


if BROKER in os.environ:
    app = make_app(os.environ[BROKER], os.environ[BACKEND])
