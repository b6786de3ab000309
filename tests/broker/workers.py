"""Workers as processes of their own, and the log their tasks write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from celery import Celery

from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


class Bench:
    """An app for the test's process, and workers that share its broker and its log."""

    def __init__(self, directory: Path, url: str, backend: str | None = None) -> None:
        self.directory = directory
        self.log = directory / "tasks.log"
        self.url = url
        self.backend = backend
        self.workers: list[Worker] = []

    def environment(self, options: dict[str, Any] | None = None, conf: dict[str, Any] | None = None) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BROKER_TEST_URL": self.url,
            "BROKER_TEST_LOG": str(self.log),
            "BROKER_TEST_OPTIONS": json.dumps(options or {}),
            "BROKER_TEST_CONF": json.dumps(conf or {}),
            **({"BROKER_TEST_BACKEND": self.backend} if self.backend else {}),
        }

    def worker(
        self, *arguments: str, options: dict[str, Any] | None = None, conf: dict[str, Any] | None = None
    ) -> Worker:
        """Start a worker and return when it is ready."""
        worker = Worker(self, len(self.workers) + 1, arguments, self.environment(options, conf))
        self.workers.append(worker)
        worker.wait_until_ready()
        return worker

    def entries(self, task: str | None = None, value: Any = None) -> list[dict[str, Any]]:
        """What the tasks have written, oldest first."""
        if not self.log.exists():
            return []
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [e for e in entries if (task is None or e["task"] == task) and (value is None or e["value"] == value)]

    def wait_for_entries(
        self, count: int, task: str | None = None, value: Any = None, timeout: float = 20
    ) -> list[Any]:
        """Return the entries once there are ``count`` of them."""

        def enough() -> list[Any] | None:
            found = self.entries(task, value)
            return found if len(found) >= count else None

        return wait_for(enough, timeout, f"{count} entries of {task}; there are {self.entries(task, value)}")

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()


class Worker:
    """One ``celery worker``."""

    def __init__(self, bench: Bench, number: int, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.name = f"w{number}@test"
        self.output = bench.directory / f"worker-{number}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.broker.application", "worker", "-l", "INFO"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "-n", self.name, *arguments],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What the worker has written so far."""
        return self.output.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the worker ended:\n{self.text}")
            return "ready." in self.text

        wait_for(ready, 40, f"the worker to be ready:\n{self.text}")

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
