"""The Celery app the workers of these tests run. What its tasks do is seen in an append-only file."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

import pgqrs_celery
from pgqrs_celery.transport import keeper

assert pgqrs_celery  # importing it registers the transport

LOG = os.environ.get("BROKER_TEST_LOG", os.devnull)

options = json.loads(os.environ.get("BROKER_TEST_OPTIONS", "{}"))
if "BROKER_TEST_PUSHED_ONLY" in os.environ:
    keeper.LOOK_INTERVAL = 3600.0
    options.setdefault("lease", 3 * 3600.0)  # a keeper looks three times in a lease at least

app = Celery("broker-tests", broker=os.environ.get("BROKER_TEST_URL"), backend=os.environ.get("BROKER_TEST_BACKEND"))
app.conf.update(
    broker_transport_options=options,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    **json.loads(os.environ.get("BROKER_TEST_CONF", "{}")),
)


def note(**what: Any) -> None:
    """Append one line to the log; small appends of several processes do not mix."""
    line = json.dumps({"at": time.time(), "pid": os.getpid(), "parent": os.getppid(), **what}) + "\n"
    fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def described(task: Task) -> dict[str, Any]:
    """What a task can know about its message."""
    request = task.request
    return {
        "id": request.id,
        "redelivered": request.delivery_info.get("redelivered"),
        "tag": request.properties.get("delivery_tag"),
        "eta": str(request.eta) if request.eta is not None else None,
        "queue": request.delivery_info.get("routing_key"),
    }


@app.task(bind=True)
def record(self: Task, value: Any = None) -> Any:
    """Note that it ran."""
    note(task="record", value=value, **described(self))
    return value


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def linger(self: Task, value: Any, seconds: float) -> Any:
    """Note the beginning and the end of a while."""
    note(task="linger", value=value, **described(self))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)
    note(task="lingered", value=value, **described(self))
    return value


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def hold(self: Task, value: Any, gate: str) -> Any:
    """Note the beginning and the end of a while that lasts until a file is there."""
    note(task="hold", value=value, **described(self))
    while not Path(gate).exists():
        time.sleep(0.02)
    note(task="held", value=value, **described(self))
    return value


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def kill_worker(self: Task, value: Any) -> None:
    """Kill the whole worker, main process first."""
    note(task="kill_worker", value=value, **described(self))
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def kill_child(self: Task, value: Any) -> None:
    """Kill the pool process, the first time."""
    note(task="kill_child", value=value, **described(self))
    if not self.request.delivery_info.get("redelivered"):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True)
def publish(self: Task, values: list[Any]) -> None:
    """Send a task for each value from inside a task."""
    note(task="publish", **described(self))
    for value in values:
        record.delay(value)
