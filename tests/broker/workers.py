"""Workers as processes of their own, and the log their tasks write."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psycopg
from celery import Celery
from psycopg import sql

from pgqrs_celery.urls import parse
from tests.support.nursery import start_celery
from tests.support.processes import ROOT
from tests.support.waiting import wait_for

#: What a failure shows of the broker.
STATE = {
    "pgqrs_messages": "queue, position, leased_by, leased_until::text, deliveries, visible_at, left(headers, 300)",
    "pgqrs_consumers": "consumer_id, pid, queues, asleep, nap, seen_at, dead_at",
}


class Bench:
    """An app for the test's process, and workers that share its broker and its log."""

    def __init__(self, directory: Path, url: str, backend: str | None = None) -> None:
        self.directory = directory
        self.log = directory / "tasks.log"
        self.url = url
        self.backend = backend
        #: The end of what the task ``hold`` does: a file that is not there until the test makes it.
        self.gate = directory / "gate"
        self.workers: list[Worker] = []

    def environment(
        self, options: dict[str, Any] | None = None, conf: dict[str, Any] | None = None, *, pushed_only: bool = False
    ) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BROKER_TEST_URL": self.url,
            "BROKER_TEST_LOG": str(self.log),
            "BROKER_TEST_OPTIONS": json.dumps(options or {}),
            "BROKER_TEST_CONF": json.dumps(conf or {}),
            **({"BROKER_TEST_BACKEND": self.backend} if self.backend else {}),
            **({"BROKER_TEST_PUSHED_ONLY": "1"} if pushed_only else {}),
        }

    def worker(self, *arguments: str, **settings: Any) -> Worker:
        """Start a worker, as ``start`` does, and return when it is ready."""
        worker = self.start(*arguments, **settings)
        worker.wait_until_ready()
        return worker

    def start(
        self,
        *arguments: str,
        options: dict[str, Any] | None = None,
        conf: dict[str, Any] | None = None,
        pushed_only: bool = False,
    ) -> Worker:
        """Start a worker.

        One with ``pushed_only`` looks at nothing by itself: what it is not told of, it never comes to know.
        """
        environment = self.environment(options, conf, pushed_only=pushed_only)
        worker = Worker(self, len(self.workers) + 1, arguments, environment)
        self.workers.append(worker)
        return worker

    def entries(self, task: str | None = None, value: Any = None) -> list[dict[str, Any]]:
        """What the tasks have written, oldest first."""
        if not self.log.exists():
            return []
        # Of a line that is just being written the beginning may be there already.
        lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        entries = [json.loads(line) for line in lines]
        return [e for e in entries if (task is None or e["task"] == task) and (value is None or e["value"] == value)]

    def wait_for_entries(
        self, count: int, task: str | None = None, value: Any = None, timeout: float = 20
    ) -> list[Any]:
        """Return the entries once there are ``count`` of them."""

        def enough() -> list[Any] | None:
            found = self.entries(task, value)
            return found if len(found) >= count else None

        try:
            return wait_for(enough, timeout, f"{count} entries of {task} {value}")
        except AssertionError as error:
            there = f"there are {self.entries(task, value)}"
            raise AssertionError(f"{error}; {there}\n{self.state()}\n{self.last_words()}") from None

    def state(self) -> str:
        """Return what the broker's tables say about messages and consumers, in front of a failure."""
        parsed = parse(self.url)
        schema = parsed.settings.get("pgqrs_schema", "public")
        lines = []
        with psycopg.connect(parsed.dsn, autocommit=True) as connection:
            for table, columns in STATE.items():
                statement = sql.SQL("SELECT {} FROM {}").format(sql.SQL(columns), sql.Identifier(schema, table))
                lines += [f"{table}: {row}" for row in connection.execute(statement)]
        return "\n".join(lines)

    def last_words(self) -> str:
        """Return the end of what each worker has logged."""
        return "\n".join(f"-- worker {worker.name}:\n{worker.text[-3000:]}" for worker in self.workers)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()


class Worker:
    """One ``celery worker``."""

    def __init__(self, bench: Bench, number: int, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.name = f"w{number}@test"
        self.output = bench.directory / f"worker-{number}.log"
        command = ["-A", "tests.broker.application", "worker", "-l", "INFO", "-n", self.name, *arguments]
        self.process = start_celery(command, env=environment, output=self.output)

    @property
    def text(self) -> str:
        """What the worker has written so far."""
        return self.output.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        self.wait_until_it_says("ready.")

    def wait_until_it_says(self, words: str) -> None:
        """Wait until the worker has written something."""

        def said() -> bool:
            ended = self.process.poll() is not None  # before the look: it may have said it with its last breath
            if words in self.text:
                return True
            if ended:
                raise AssertionError("the worker ended")
            return False

        try:
            wait_for(said, 40, f"the worker to say {words!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.text}") from None

    def send_signal(self, number: int) -> None:
        """Send a signal to the main process."""
        os.kill(self.process.pid, number)

    def end(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal, wait for the end of the main process and return its exit code."""
        self.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End every process of the worker."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.process.wait(30)


def application(url: str, backend: str | None = None, **options: Any) -> Celery:
    """A client app that sends the tasks by their names."""
    app = Celery("broker-tests", broker=url, backend=backend)
    app.conf.broker_transport_options = options
    return app
