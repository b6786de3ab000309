"""pytest-celery's nodes, with a local process where it has a container: no docker is needed.

pytest-celery reaches docker in two places only: in the fixtures that make containers, which ``conftest.py`` overrides,
and in the docker object that each of its containers wraps. Here that object is a `LocalContainer`. Everything above,
from ``CeleryTestContainer`` to ``CeleryTestSetup``, is used as it is.
"""

from __future__ import annotations

import os
import secrets
import signal as signals
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import celery
import psutil
from pytest_celery import CeleryTestContainer, CeleryWorkerContainer

from pgqrs_celery.embedded import RedisServer
from tests.support.processes import ROOT, start_process
from tests.support.waiting import wait_for

__all__ = ["LocalContainer", "RedisNode", "WorkerNode"]

READY_TIMEOUT: Final = 60.0

#: Exit of an orderly stop.
STOP_TIMEOUT: Final = 60.0


class LocalContainer(ABC):
    """What pytest-celery uses of docker's container object."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.id = secrets.token_hex(32)

    @property
    @abstractmethod
    def status(self) -> str:
        """``running`` or ``exited``."""

    @abstractmethod
    def start(self) -> None:
        """Start it."""

    @abstractmethod
    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal (SIGKILL, unless another is named); without one that ends it, it goes on."""

    @abstractmethod
    def stop(self) -> None:
        """End it in order."""

    def restart(self, timeout: float = 0) -> None:
        """Stop it, and start it again."""
        self.stop()
        self.start()

    @abstractmethod
    def reload(self) -> None:
        """Bring the status up to date."""

    def logs(self) -> bytes:
        """Return what it has written."""
        return b""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What docker knows about it: no networks and no ports of its own."""
        return {
            "Config": {"Hostname": self.id[:12], "Env": []},
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }


class LocalProcess(LocalContainer):
    """A program in a process group of its own, which is to it what a container is."""

    def __init__(self, name: str, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        super().__init__(name)
        self._command = [part.replace("%h", self.id[:12]) for part in command]
        self._cwd, self._env = cwd, {**os.environ, **env}
        self._log = cwd / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def status(self) -> str:
        """``running`` or ``exited``."""
        return "running" if self._process is not None and self._process.poll() is None else "exited"

    def start(self) -> None:
        """Start the program; its log begins anew."""
        with self._log.open("wb") as output:
            self._process = start_process(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self._cwd, env=self._env
            )

    def reload(self) -> None:
        """Do nothing: the status is never out of date."""

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal to the program; SIGKILL ends all its processes, as ``docker kill`` does."""
        assert self._process is not None
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal or signals.SIGKILL)
        if number is signals.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait()
        else:
            self._process.send_signal(number)

    def has(self, pid: int) -> bool:
        """Return whether a process is the program's own, or a child of it."""
        assert self._process is not None
        if pid == self._process.pid:
            return True
        return self.status == "running" and pid in (c.pid for c in psutil.Process(self._process.pid).children())

    def stop(self) -> None:
        """End the program in order."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(STOP_TIMEOUT)

    def logs(self) -> bytes:
        """Return what the program has written since it was started."""
        return self._log.read_bytes()

    def exec_run(self, command: str) -> tuple[int, bytes]:
        """Run a shell command where the program runs."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        answer = subprocess.run(
            command, shell=True, capture_output=True, cwd=self._cwd, env={**self._env, "PATH": path}, check=False
        )
        return answer.returncode, answer.stdout + answer.stderr


class LocalRedis(LocalContainer):
    """A Redis of the tests' own."""

    def __init__(self, server: RedisServer) -> None:
        super().__init__("redis")
        self.server = server

    @property
    def status(self) -> str:
        """``running`` or ``exited``."""
        return "running" if self.server.pid is not None else "exited"

    def start(self) -> None:
        """Start it on the port it had, empty."""
        self.server.start()

    def reload(self) -> None:
        """Do nothing: the status is never out of date."""

    def kill(self, signal: str | int | None = None) -> None:
        """Kill it."""
        assert signal in (None, "SIGKILL"), f"a Redis node is killed or stopped, not sent {signal}"
        self.server.kill()

    def stop(self) -> None:
        """End it in order."""
        self.server.stop()


class RedisNode(CeleryTestContainer):
    """A Redis as pytest-celery's broker or result backend, one numbered database each."""

    def __init__(self, server: RedisServer, database: int) -> None:
        super().__init__(LocalRedis(server))
        self._url = server.database_url(database)
        self._vhost = str(database)
        self._port = server.port

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """Where it is; the same from everywhere."""
        return {
            "url": self._url,
            "host_url": self._url,
            "hostname": "127.0.0.1",
            "port": self._port,
            "vhost": self._vhost,
        }

    def ready(self) -> bool:
        """Return whether it runs: a server that has been started answers."""
        return bool(self.status == "running")


class WorkerNode(CeleryWorkerContainer):
    """A worker as pytest-celery starts it: its command, its environment and its directory of generated modules."""

    def __init__(self, directory: Path, content: Mapping[str, bytes], env: Mapping[str, str], command: Sequence[str]):
        for name, source in content.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
        python_path = os.pathsep.join([str(directory), str(ROOT)])
        local = LocalProcess(
            "worker",
            [sys.executable, "-m", *command, "-c", "2", "--without-mingle", "--without-gossip"],
            cwd=directory,
            env={**env, "PYTHONPATH": python_path},
        )
        super().__init__(local)

    @classmethod
    def version(cls) -> str:
        """Return the version of Celery, which is that of the tests."""
        return str(celery.__version__)

    def ready(self) -> bool:
        """Wait until it takes messages."""
        wait_for(self._is_ready, READY_TIMEOUT, f"worker node {self.name} to be ready")
        return True

    def _is_ready(self) -> bool:
        if self.status != "running":
            raise AssertionError(f"worker node {self.name} ended while starting:\n{self.logs()[-4000:]}")
        return self.ready_prompt in self.logs()

    def has(self, pid: int) -> bool:
        """Return whether a process belongs to this worker."""
        return bool(self._container.has(pid))

    def restart(self, timeout: int = 0) -> None:
        """Stop it if it still runs, start it again, and wait until it takes messages."""
        self._container.restart()
        self.ready()

    def teardown(self) -> None:
        """Kill what is left of it."""
        self._container.kill()
