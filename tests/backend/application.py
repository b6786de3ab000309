"""The Celery app of these tests: what a worker process imports, and what a test makes for itself.

A worker finds its URLs in the environment; side effects go to an append-only file that the tests read.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Final

from celery import Celery

from pgqrs_celery import backend
from pgqrs_celery.backend import PostgresBackend
from pgqrs_celery.store import chords

BROKER: Final = "PGQRS_TEST_BROKER"
BACKEND: Final = "PGQRS_TEST_BACKEND"
JOURNAL: Final = "PGQRS_TEST_JOURNAL"
#: ``point:file``: where a worker's child is to be killed, once; the file is made then.
CRASH: Final = "PGQRS_TEST_CRASH"


def note(line: str) -> None:
    """Append a line to the journal; one ``write`` of a short line is atomic."""
    path = os.environ.get(JOURNAL)
    if path:
        with open(path, "a") as journal:
            journal.write(line + "\n")


def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


def total(numbers: list[Any]) -> int:
    """Return the sum of numbers and of lists of numbers, and leave a note."""
    note("total")
    return sum(sum(n) if isinstance(n, list) else n for n in numbers)


def echo(value: Any) -> Any:
    """Return the argument."""
    note(f"echo {value}")
    return value


def fail(message: str = "no") -> None:
    """Raise."""
    raise ValueError(message)


def errback(request: Any, exc: BaseException, traceback: Any) -> None:
    """Leave a note of a failure."""
    note(f"errback {type(exc).__name__}")


def nap(seconds: float) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds


def hold(flag: str, value: Any) -> Any:
    """Return the value as soon as the file is there."""
    note(f"hold {os.getpid()}")
    while not Path(flag).exists():
        time.sleep(0.01)
    return value


TASKS: Final = {
    "add": (add, {}),
    "total": (total, {}),
    "echo": (echo, {}),
    "fail": (fail, {}),
    "errback": (errback, {}),
    "nap": (nap, {}),
    "hold": (hold, {"acks_late": True, "reject_on_worker_lost": True}),
    "ignored": (echo, {"ignore_result": True}),
    "started": (echo, {"track_started": True}),
}


def make_app(broker: str, results: str, **conf: Any) -> Celery:
    """Return an app with all tasks of this module."""
    app = Celery("tests.backend.application", broker=broker, backend=results, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, **conf)
    for name, (function, options) in TASKS.items():
        app.task(name=name, **options)(function)
    app.finalize()
    return app


def die_at(point: str, flag: str) -> None:
    """Have this process killed the first time any process comes to a point of a chord's completion."""
    owner: Any = {"finish_chord": PostgresBackend, "header_values": PostgresBackend}.get(point, chords)
    original = getattr(owner, point)

    def killing(*args: Any, **kwargs: Any) -> Any:
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, point, killing)


if BROKER in os.environ:
    app = make_app(os.environ[BROKER], os.environ[BACKEND])
    if CRASH in os.environ:
        die_at(*os.environ[CRASH].split(":", 1))
        backend.TIDY_INTERVAL = 0.1
        chords.CLAIM = 1.0  # type: ignore[misc]
