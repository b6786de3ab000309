"""An embedded Postgres: started on demand, shared by processes, stopped when idle.

No Python process owns the server. Each of them holds a lease; a small supervisor (see ``supervisor.py``) runs
the postmaster as long as there is one. A directory holds everything::

    data/             the cluster
    sock/             the socket; mode 0700, as there is no password
    server.json       what runs, with which settings
    leases            locked, shared, by every client
    supervisor.lock   locked by the supervisor; holds its pid
    server.lock       locked by the processes of the server
    binaries/         a copy, if the account the server runs as cannot reach the wheel
    postgres.log, supervisor.log
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from pgqrs_celery.embedded import supervisor
from pgqrs_celery.embedded.account import Account, make_directory, server_account, unreachable
from pgqrs_celery.embedded.binaries import Binaries, find_postgres, python
from pgqrs_celery.embedded.locks import FileLock
from pgqrs_celery.embedded.supervisor import PostmasterFile, Spec
from pgqrs_celery.exceptions import ConfigurationError, EmbeddedUnavailable

__all__ = ["PostgresServer", "default_directory"]

#: Seconds the server goes on after the last lease; a script started again and again finds it running.
IDLE = 5.0

#: Seconds `PostgresServer.start` waits; creating a cluster on a slow disk takes ten.
START_TIMEOUT = 60.0

#: Names the directory for embedded servers instead of the per-user one.
HOME_VARIABLE = "PGQRS_CELERY_HOME"

_SETTINGS = {
    "max_connections": "100",
    "shared_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "10s",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

#: How the server is found and told apart; no setting of the caller's may change it.
_RESERVED = frozenset(
    {"cluster_name", "config_file", "data_directory", "external_pid_file", "listen_addresses", "port"}
    | {"unix_socket_directories", "unix_socket_permissions", "update_process_title"}
)

# struct sockaddr_un holds 104 bytes on macOS, 108 on Linux.
_LONGEST_SOCKET_PATH = 100
_SOCKET = ".s.PGSQL.5432"


def default_directory() -> Path:
    """Where the servers of this user live: ``PGQRS_CELERY_HOME``, else the per-user state directory.

    For root it is below ``/var/lib``: root's home is closed to the account that Postgres runs as.
    """
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/pgqrs-celery")
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    try:
        return (state if state.is_absolute() else Path.home() / ".local" / "state") / "pgqrs-celery"
    except RuntimeError as error:
        raise EmbeddedUnavailable(f"this user has no home directory; set {HOME_VARIABLE}") from error


class PostgresServer:
    """A handle on the server in ``directory``; any number of them, in any number of processes, share it.

    ``start()`` takes a lease and returns when the server accepts connections, starting it if need be. The
    lease ends with ``release()``, the ``with`` block, or the process and all the children it forked; ``idle``
    seconds after the last lease the server stops. ``settings`` are server settings by name and apply when
    this call starts the server; a running one with other values is an `EmbeddedUnavailable`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bindir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        idle: float = IDLE,
    ) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self._bindir = bindir
        self._settings = {name.lower(): str(value) for name, value in (settings or {}).items()}
        if forbidden := sorted(_RESERVED & self._settings.keys()):
            raise ConfigurationError(f"{', '.join(forbidden)}: the embedded server sets this itself")
        self._idle = idle
        self._lease: FileLock | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.directory)!r}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # Addresses

    @property
    def socket_directory(self) -> Path:
        """Where the server listens; outside of ``directory`` if its path is too long for a socket's name."""
        inside = self.directory / "sock"
        if len(os.fsencode(inside / _SOCKET)) <= _LONGEST_SOCKET_PATH:
            return inside
        digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
        return Path("/tmp") / f"pgqrs-{os.geteuid()}-{digest}"

    @property
    def _socket(self) -> Path:
        return self.socket_directory / _SOCKET

    def dsn(self, database: str = "postgres", *, driver: str = "") -> str:
        """A URL for libpq and psycopg; with ``driver="psycopg"`` the form SQLAlchemy wants."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@/{quote(database)}?host={quote(str(self.socket_directory))}"

    # Life

    def start(self, timeout: float = START_TIMEOUT) -> Self:
        """Take a lease and see to it that the server runs. Cheap (below a millisecond) when it does.

        To be called again after a lost connection, too: if the supervisor was killed, this starts another.
        Raises `EmbeddedUnavailable` with the reason.
        """
        deadline = time.monotonic() + timeout
        try:
            if not self.directory.is_dir():
                self._account()  # to fail before anything is made
                make_directory(self.directory, passable=os.geteuid() == 0)
            self._take_lease(deadline)
            self._wait(self._running_or_launched, deadline, f"become ready (see {supervisor.LOG})")
            self._check_settings()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise EmbeddedUnavailable(f"{self.directory} cannot be used: {error}") from error
            raise
        return self

    def _running_or_launched(self) -> bool:
        if self._running():
            return True
        lock = FileLock.try_exclusive(self.directory / supervisor.LOCK)
        if lock is None:
            return False
        try:
            self._launch(lock)
        finally:
            lock.close()
        return self._running()

    def release(self) -> None:
        """Give the lease back; nothing happens to a server that others use."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def stop(self, timeout: float = START_TIMEOUT) -> None:
        """Stop the server now, for everybody, and wait until it is gone."""
        self.release()
        pid = self.supervisor_pid
        if pid is not None:
            _kill(pid, signal.SIGTERM)
            self._wait(lambda: self.supervisor_pid != pid, time.monotonic() + timeout, "end")

    def restart(self, *, immediate: bool = True, timeout: float = START_TIMEOUT) -> None:
        """Restart the postmaster and wait until it is ready again.

        ``immediate`` drops every connection and leaves the next start to crash recovery, as
        ``pg_ctl restart -m immediate`` does; otherwise transactions are rolled back in order.
        """
        self._replace_postmaster(signal.SIGQUIT if immediate else signal.SIGINT, timeout)

    def crash(self, timeout: float = START_TIMEOUT) -> None:
        """Kill the postmaster with SIGKILL and wait until its successor is ready."""
        self._replace_postmaster(signal.SIGKILL, timeout)

    def _replace_postmaster(self, number: signal.Signals, timeout: float) -> None:
        old = self.postmaster_pid
        if old is None:
            raise EmbeddedUnavailable(f"{self.directory}: the server is not running")
        _kill(old, number)
        deadline = time.monotonic() + timeout
        self._wait(lambda: self._running_or_launched() and self.postmaster_pid not in (None, old), deadline, "return")

    def _wait(self, condition: Callable[[], bool], deadline: float, verb: str) -> None:
        while not condition():
            if time.monotonic() > deadline:
                raise EmbeddedUnavailable(f"{self.directory}: the server there did not {verb} in time")
            time.sleep(0.01)

    # State

    @property
    def postmaster_pid(self) -> int | None:
        """The pid in the data directory, where a killed postmaster leaves it; None after a clean stop."""
        file = PostmasterFile.read(self.data)
        return file.pid if file else None

    @property
    def supervisor_pid(self) -> int | None:
        """The living supervisor's pid; None if there is none."""
        path = self.directory / supervisor.LOCK
        if not path.exists():
            return None
        lock = FileLock.try_shared(path)
        if lock is not None:
            lock.close()
            return None
        text = path.read_text().strip()
        return int(text) if text else None

    def _running(self) -> bool:
        """Whether a supervised server accepts connections."""
        file = PostmasterFile.read(self.data)
        if file is None or file.status != "ready" or self.supervisor_pid is None:
            return False
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self._socket))
            except OSError:  # a postmaster that was killed leaves its socket and its file behind
                return False
        return True

    def _check_settings(self) -> None:
        running = Spec.read(self.directory).settings
        other = {name: running.get(name) for name, value in self._settings.items() if running.get(name) != value}
        if other:
            wanted = {name: self._settings[name] for name in other}
            raise EmbeddedUnavailable(
                f"{self.directory}: the server there already runs with {other}, and {wanted} was asked for; "
                "stop it first, or use another directory"
            )

    # Starting

    def _take_lease(self, deadline: float) -> None:
        def try_lease() -> bool:  # in vain while the supervisor is just stopping the server
            self._lease = FileLock.try_shared(self.directory / supervisor.LEASES)
            return self._lease is not None

        if self._lease is None or not self._lease.in_place:
            self._wait(try_lease, deadline, "end")

    def _launch(self, lock: FileLock) -> None:
        """Prepare the cluster and start a supervisor, which inherits ``lock``."""
        os.ftruncate(lock.fd, 0)  # a supervisor that was killed left its pid there
        account = self._account()
        binaries = find_postgres(self._bindir, major=self._existing_major())
        binaries = binaries.readable_by(account, self.directory / "binaries")
        try:
            self._own_directory(self.socket_directory, account)
            if not self.data.exists():
                self._initdb(binaries, account)
            self._spec(binaries, account).write(self.directory)
            self._spawn(lock)
        except OSError as error:
            whom = f" as user {account.name!r}, as it may not run as root" if account else ""
            raise EmbeddedUnavailable(f"{self.directory}: Postgres cannot be started{whom}: {error}") from error

    def _account(self) -> Account | None:
        account = server_account(self.data)
        if account is not None and (place := unreachable(self.directory, account)):
            raise EmbeddedUnavailable(
                f"{self.directory} cannot hold a Postgres: as root it runs as user {account.name!r}, who may "
                f"not enter {place}. Choose another directory (the default is {default_directory()}; "
                "embedded.new_directory() makes a temporary one), or set PGQRS_CELERY_DSN"
            )
        return account

    def _existing_major(self) -> int | None:
        version = self.data / "PG_VERSION"
        return int(version.read_text()) if version.exists() else None

    def _own_directory(self, path: Path, account: Account | None) -> None:
        """Make ``path``, mode 0700, the server's own."""
        uid = os.geteuid() if account is None else account.uid
        try:
            path.mkdir(mode=0o700)
            if account is not None:
                os.chown(path, account.uid, account.gid)
        except FileExistsError:
            info = path.lstat()
            if info.st_uid != uid or path.is_symlink():
                raise EmbeddedUnavailable(f"{path} exists, and does not belong to user {uid}; remove it") from None

    def _initdb(self, binaries: Binaries, account: Account | None) -> None:
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._own_directory(unfinished, account)
        locale = (
            ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
            if binaries.major >= 17
            else ["--no-locale"]
        )
        durable = self._settings.get("fsync", "on") in ("on", "true", "yes", "1")
        command = [binaries.program("initdb"), "-D", str(unfinished), "-U", "postgres", "-E", "UTF8", *locale]
        command += ["--auth-local=trust", "--auth-host=reject", "--no-instructions"]
        command += [] if durable else ["--no-sync"]
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        if answer.returncode:
            raise EmbeddedUnavailable(
                f"initdb failed in {self.directory}: {answer.stderr.strip() or answer.stdout.strip()}. "
                "Set PGQRS_CELERY_DSN to use a server of your own"
            )
        unfinished.rename(self.data)

    def _spec(self, binaries: Binaries, account: Account | None) -> Spec:
        settings = _SETTINGS | self._settings
        fixed = {
            "cluster_name": supervisor.cluster_name(self.data),
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_directory),
            "unix_socket_permissions": "0700",
        }
        command = [binaries.program("postgres"), "-D", str(self.data)]
        for name, value in (settings | fixed).items():
            command += ["-c", f"{name}={value}"]
        return Spec(
            command=command,
            data=str(self.data),
            socket=str(self._socket),
            settings=settings,
            idle=self._idle,
            uid=account.uid if account else None,
            gid=account.gid if account else None,
        )

    def _spawn(self, lock: FileLock) -> None:
        script = [python(), "-I", "-S", supervisor.__file__, "supervise", str(self.directory), str(lock.fd)]
        with (self.directory / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                script,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                pass_fds=[lock.fd],
                start_new_session=True,
            )
        with process:
            assert process.stdout is not None
            report = process.stdout.readline()
        message = json.loads(report) if report else "the supervisor ended at once; see supervisor.log"
        if message != "ready":
            raise EmbeddedUnavailable(f"{self.directory}: {message}")


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
