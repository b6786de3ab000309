"""The processes of the demo: a Postgres, and workers to be killed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kombu.utils.url import maybe_sanitize_url

from examples.demo.app import app, pgqrs
from examples.demo.screen import Screen
from examples.support import JOURNAL, Journal, Worker, wait_for
from pgqrs_celery import embedded
from pgqrs_celery.conf import DSN_VARIABLE

__all__ = ["Claim", "Stage", "stage"]

Value = TypeVar("Value")

#: Workers that run at the same time.
TOGETHER = 2


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing an act claims, whether it held, and what shows it."""

    held: bool
    text: str
    evidence: str


class Stage:
    """What an act has at its disposal."""

    def __init__(self, directory: Path, journal: Journal, screen: Screen) -> None:
        self.directory = directory
        self.journal = journal
        self.screen = screen
        self.workers: dict[str, Worker] = {}
        self._names: dict[int, str] = {}
        self._numbers = itertools.count(1)

    def start_workers(self) -> None:
        """See to it that two workers run; returns when they have registered."""
        missing = range(TOGETHER - len(self.workers))
        started = [Worker(app, name=f"worker-{next(self._numbers)}", concurrency=2) for _ in missing]
        for worker in started:
            self.workers[worker.name] = worker
            self._names[worker.pid] = worker.name
        for worker in started:
            worker.ready()
            self.screen.say(f"{worker.name} is ready (pid {worker.pid})")

    def name_of(self, pid: int) -> str:
        """Return the name of the worker with this main process, dead or alive."""
        return self._names.get(pid, f"pid {pid}")

    def kill(self, name: str) -> float:
        """SIGKILL a worker with all its processes; returns the moment."""
        return self.workers.pop(name).kill()

    def wait_for(self, condition: Callable[[], Value | None], what: str) -> Value:
        """Wait for a condition; raises ``TimeoutError`` with the workers' logs."""
        try:
            return wait_for(condition, what, timeout=45)
        except TimeoutError as error:
            logs = "\n".join(f"--- {worker.name}\n{worker.log[-3000:]}" for worker in self.workers.values())
            raise TimeoutError(f"{error}\n{logs}") from None

    def close(self) -> None:
        """Stop the workers, all at the same time."""
        for worker in self.workers.values():
            worker.terminate()
        while self.workers:
            self.workers.popitem()[1].stop()


@contextmanager
def stage(screen: Screen) -> Iterator[Stage]:
    """Set up servers that vanish afterwards; a database named in the environment is used instead of an embedded one."""
    directory = embedded.new_directory("pgqrs-demo-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        journal = Journal(directory / "journal")
        os.environ[JOURNAL] = str(journal.path)
        if DSN_VARIABLE not in os.environ:
            server = embedded.postgres(directory / "postgres")
            stack.callback(server.stop)
            os.environ[DSN_VARIABLE] = server.dsn()
            screen.say(f"an embedded Postgres runs (pid {server.postmaster_pid})")
        if other := os.environ.get("CELERY_BROKER_URL"):
            screen.say(f"messages go through {maybe_sanitize_url(other)}")
        else:
            screen.say("it is broker, result backend and ledger: nothing else runs")
        pgqrs.install()
        stack.callback(pgqrs.ledger.database.close)
        made = Stage(directory, journal, screen)
        stack.callback(made.close)
        yield made
