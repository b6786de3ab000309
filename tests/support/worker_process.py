"""A real ``celery worker`` in a process group of its own, to be killed, frozen and stopped by pid."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.nursery import ForkedProgram, start_celery
from tests.support.scenario import Scenario
from tests.support.waiting import wait_for

__all__ = ["WorkerProcess"]

START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 60.0


class WorkerProcess:
    """One worker of a scenario; in a ``with`` block it is ready at the beginning and gone at the end."""

    def __init__(
        self,
        scenario: Scenario,
        name: str,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        app: str = "tests.support.worker_app",
        arguments: Sequence[str] = (),
    ) -> None:
        self.scenario = scenario
        self.name = name
        self.hostname = f"{name}@acceptance"
        self.log = Path(scenario.directory) / f"{name}.log"
        self._arguments = [
            *("-A", app, "worker", "-l", "INFO"),
            *("-n", self.hostname, "-P", pool, "-c", str(concurrency)),
            *("--without-mingle", "--without-gossip", *arguments),
        ]
        self._process: ForkedProgram | subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Life

    def start(self) -> None:
        """Start it; `wait_ready` tells when it takes messages."""
        self._process = start_celery(self._arguments, env=self.scenario.environment(), output=self.log)

    def wait_ready(self) -> None:
        """Return when it takes messages."""
        wait_for(self._is_ready, START_TIMEOUT, f"worker {self.name} to be ready; see {self.log}")

    def _is_ready(self) -> bool:
        if not self.alive:
            raise AssertionError(f"worker {self.name} ended while starting:\n{self.output()[-4000:]}")
        return f"{self.hostname} ready." in self.output()

    def close(self) -> None:
        """End whatever is left of it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    # What it is

    @property
    def process(self) -> ForkedProgram | subprocess.Popen[bytes]:
        """The main process; the worker must have been started."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The pid of the main process, and of its group."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the main process runs."""
        return self.process.poll() is None

    def has(self, pid: int) -> bool:
        """Return whether a process belongs to this worker."""
        try:  # a list of a process's children takes a look at every process of the machine
            return os.getpgid(pid) == self.pid
        except ProcessLookupError:
            return False

    def output(self) -> str:
        """Return what it has logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # What is done to it

    def kill(self) -> None:
        """Kill all its processes, as a lost host or a container that is out of memory would."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def kill_child(self, pid: int) -> None:
        """Kill one process of its pool."""
        assert self.has(pid), f"{pid} is no process of worker {self.name}"
        assert pid != self.pid, f"{pid} is the main process of worker {self.name}"
        os.kill(pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all its processes in mid-flight, as a paused virtual machine would."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen worker go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process: SIGTERM stops warmly, SIGQUIT coldly."""
        self.process.send_signal(number)

    def wait_exit(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait until it has ended and return its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"worker {self.name} did not end in {timeout:g} s:\n{self.output()[-4000:]}") from None
