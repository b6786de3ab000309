"""What the examples share: workers of their own, and a journal that is independent of the ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from celery import Celery

from pgqrs_celery.embedded import supervisor

__all__ = ["JOURNAL", "Entry", "Journal", "Worker", "wait_for"]

Value = TypeVar("Value")

#: Names the journal to the processes of an example.
JOURNAL = "EXAMPLE_JOURNAL"

ROOT = Path(__file__).parents[1]


def wait_for(condition: Callable[[], Value | None], what: str, timeout: float = 60.0) -> Value:
    """Call ``condition`` until it returns something true, and return that; raises ``TimeoutError``."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.01)
    return value


class Worker:
    """A ``celery worker`` in a process group of its own, so that it can be killed whole, as a lost machine is."""

    def __init__(
        self,
        app: Celery,
        *,
        name: str = "worker",
        concurrency: int = 1,
        options: tuple[str, ...] = ("--loglevel=INFO",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.app = app
        self.name = name
        self._log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        command = [sys.executable, "-m", "celery", "-A", app.main, "worker", f"--hostname={name}@%h"]
        command += [
            f"--concurrency={concurrency}",
            "--without-gossip",
            "--without-mingle",
            *options,
        ]
        # On Linux the worker is told to stop when the example is killed.
        leash = [sys.executable, "-I", "-S", supervisor.__file__, "leash", str(os.getpid())]
        self._process = subprocess.Popen(
            [*leash, *command],
            stdout=self._log,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The pid of its main process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return Path(self._log.name).read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ready(self) -> Self:
        """Return when it has registered with the ledger; raises ``RuntimeError`` with its log if it ends before."""
        wait_for(self._registered, f"worker {self.name} to register; its log:\n{self.log}")
        return self

    def _registered(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"worker {self.name} ended:\n{self.log}")
        pgqrs: Any = self.app.pgqrs  # type: ignore[attr-defined]
        return any(worker.pid == self.pid for worker in pgqrs.monitor.workers(app=pgqrs.ledger.app))

    def kill(self) -> float:
        """SIGKILL all its processes at once; returns the moment, on the clock of ``time.time()``."""
        moment = time.time()
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        return moment

    def kill_child(self, pid: int) -> None:
        """SIGKILL one process of its pool."""
        os.kill(pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end as a deployment does: it finishes what it is executing."""
        self._process.terminate()

    def stop(self) -> None:
        """Ask it to end, and wait for that; by force after 20 seconds."""
        if self._process.poll() is None:
            self.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a journal."""

    event: str
    pid: int
    worker: int
    at: float
    note: str = ""


class Journal:
    """An append-only file in which tasks write what they really do.

    The proofs of the examples rest on it, not on the ledger: what is under test does not testify. A line is written
    with one ``write`` to a file opened for appending, so the lines of several processes do not mix, and a line that
    was written is there whatever happens to the process afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_environment(cls) -> Self:
        """The journal named in the environment."""
        return cls(Path(os.environ[JOURNAL]))

    def write(self, event: str, note: str = "") -> None:
        """Append a line about this process (``worker`` is its parent: the worker's main process)."""
        line = json.dumps({"event": event, "pid": os.getpid(), "worker": os.getppid(), "at": time.time(), "note": note})
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)

    def read(self, event: str | None = None) -> list[Entry]:
        """Return all lines, or those of one event, in the order they were written."""
        if not self.path.exists():
            return []
        entries = [Entry(**json.loads(line)) for line in self.path.read_text().splitlines()]
        return [entry for entry in entries if event is None or entry.event == event]
