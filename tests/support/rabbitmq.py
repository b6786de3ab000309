"""A RabbitMQ for the tests: own node, ports, cookie and directory, on loopback, as root or not.

Starting one takes five seconds, so all workers of a test session share it: each holds a lease, and a holder
process (this module, run as a script) keeps the server until the last lease is gone. Each test gets a virtual
host, made through the management API in some 15 ms (``rabbitmqctl`` would take 400).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pgqrs_celery.embedded import supervisor
from pgqrs_celery.embedded.locks import FileLock
from pgqrs_celery.embedded.redis import free_port
from tests.support.waiting import wait_for

START_TIMEOUT = 90.0

# Debian's /usr/sbin/rabbitmq-server insists on its own user and directory; the script behind it does not.
_SCRIPTS = ("/usr/lib/rabbitmq/bin/rabbitmq-server",)


def find_rabbitmq() -> Path | None:
    """The server's start script, if RabbitMQ and Erlang are installed."""
    if shutil.which("erl") is None or shutil.which("epmd") is None:
        return None
    for script in (*_SCRIPTS, shutil.which("rabbitmq-server") or ""):
        if script and os.access(script, os.X_OK):
            return Path(script)
    return None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a running server listens."""

    port: int
    management_port: int

    def url(self, vhost: str) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost}"

    def request(self, method: str, path: str) -> None:
        """Call the management API; raises on any answer but success."""
        token = base64.b64encode(b"guest:guest").decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.management_port}/api{path}",
            method=method,
            headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            pass

    @contextmanager
    def vhost(self) -> Iterator[str]:
        """The URL of a new, empty virtual host, removed with all its queues and connections afterwards."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.request("PUT", f"/vhosts/{name}")
        try:
            yield self.url(name)
        finally:
            self.request("DELETE", f"/vhosts/{name}")


class RabbitMQServer:
    """A server in ``directory`` that ends with this object's ``with`` block, or with this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = Address(free_port(), free_port())
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        plugins, config = self.directory / "enabled_plugins", self.directory / "rabbitmq.conf"
        plugins.write_text("[rabbitmq_management].\n")
        config.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.address.port}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self.address.management_port}\n"
            "disk_free_limit.absolute = 10MB\n"
        )
        epmd_port = free_port()
        settings = {
            "HOME": self.directory,  # the Erlang cookie's place
            "ERL_EPMD_PORT": epmd_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"pgqrs-{self.address.port}@localhost",
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_MNESIA_BASE": self.directory / "mnesia",
            "RABBITMQ_LOG_BASE": self.directory / "log",
            "RABBITMQ_CONFIG_FILE": config,
            "RABBITMQ_ADVANCED_CONFIG_FILE": self.directory / "advanced.config",
            "RABBITMQ_CONF_ENV_FILE": self.directory / "rabbitmq-env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": plugins,
            "RABBITMQ_ALLOW_INPUT": 1,  # makes the script become the Erlang machine instead of its parent
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput +S 2:2 +sbwt none",
        }
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        # Without a port mapper of our own, Erlang would leave one running for everybody.
        self._run(["epmd", "-port", str(epmd_port), "-address", "127.0.0.1"], environment)
        self._run([str(find_rabbitmq())], environment)
        wait_for(self._answers, START_TIMEOUT, "RabbitMQ to answer")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # By force: an orderly stop takes six seconds, and nobody wants the data.
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        program = shutil.which(command[0])
        assert program is not None
        leash = [sys.executable, "-I", "-S", supervisor.__file__, "leash", str(os.getpid())]
        with (self.directory / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [*leash, program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)

    def _answers(self) -> bool:
        if any(process.poll() is not None for process in self._processes):
            output = (self.directory / "output.log").read_text(errors="replace")
            raise RuntimeError(f"RabbitMQ ended while starting:\n{output[-3000:]}")
        try:
            with socket.create_connection(("127.0.0.1", self.address.port), timeout=1):
                pass
            self.address.request("GET", "/overview")
        except OSError:
            return False
        return True


@contextmanager
def shared_rabbitmq(directory: Path) -> Iterator[Address]:
    """The server all processes with this ``directory`` share, started by the first, stopped after the last."""
    directory.mkdir(parents=True, exist_ok=True)
    ready, lock_path = directory / "ready.json", directory / "holder.lock"
    lease = wait_for(lambda: FileLock.try_shared(directory / "leases"), START_TIMEOUT, "the last server to end")

    holder: subprocess.Popen[bytes] | None = None

    def address() -> Address | None:
        nonlocal holder
        lock = FileLock.try_exclusive(lock_path)
        if lock is not None:
            if holder is not None:
                raise RuntimeError(f"RabbitMQ did not start:\n{(directory / 'holder.log').read_text()[-3000:]}")
            ready.unlink(missing_ok=True)
            holder = _start_holder(directory, lock)
            lock.close()
        return Address(**json.loads(ready.read_text())) if ready.exists() else None

    try:
        yield wait_for(address, START_TIMEOUT, "RabbitMQ to start")
    finally:
        lease.close()


def wait_until_gone(directory: Path) -> None:
    """Return when the shared server in ``directory`` has ended; its last lease must have been given back."""
    lock_path = directory / "holder.lock"
    if lock_path.exists():
        wait_for(lambda: FileLock.try_exclusive(lock_path), 30, "RabbitMQ to end").close()


def _start_holder(directory: Path, lock: FileLock) -> subprocess.Popen[bytes]:
    with (directory / "holder.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
            pass_fds=[lock.fd],
            start_new_session=True,
        )


def _hold(directory: Path) -> None:
    """Run the server until nobody holds a lease; the inherited, locked holder.lock ends with this process."""
    with RabbitMQServer(directory / "server") as server:
        ready = directory / "ready.json"
        ready.with_suffix(".new").write_text(
            json.dumps({"port": server.address.port, "management_port": server.address.management_port})
        )
        ready.with_suffix(".new").rename(ready)
        while FileLock.try_exclusive(directory / "leases") is None:
            time.sleep(0.25)


if __name__ == "__main__":
    _hold(Path(sys.argv[1]))
