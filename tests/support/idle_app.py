"""A worker as people have it: one Postgres for everything, and every setting as it comes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from pgqrs_celery import Pgqrs

URL = os.environ["IDLE_TEST_URL"]

app = Celery("idle", broker=URL, backend=URL)
pgqrs = Pgqrs(app)


@app.task
def plain(value: str) -> str:
    """Return what was given."""
    return value


@app.task(acks_late=True, reject_on_worker_lost=True)
def hold(journal: str) -> None:
    """Write down which worker has begun it, and stay busy for longer than any test."""
    with Path(journal).open("a") as file:
        file.write(f"{os.getppid()}\n")
    time.sleep(600)
