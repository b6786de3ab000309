"""The process between us and a server: it keeps Postgres running while somebody holds a lease, then stops it.

This file is run as a script, by path, in an isolated interpreter, so it imports the standard library only: a
supervisor that loaded Celery would cost fifty megabytes and half a second. ``server.json`` in the server's
directory says what to run; the inherited descriptor of ``supervisor.lock`` says that nobody else does.

The life of a server::

    evict what an earlier supervisor left behind -> start -> "ready" on stdout -> watch:
        the postmaster died            start it again
        nobody holds a lease           wait `idle` seconds, take the leases file exclusively, stop, end
        SIGTERM, SIGINT                stop, end

Every client holds a shared lock on ``leases``; the kernel drops it with the process, however that ends. The
lock taken exclusively for stopping is kept until the end, so a client that comes in between waits, and then
starts a new server. Should the supervisor itself be killed, Linux stops its postmaster
(``PR_SET_PDEATHSIG``); elsewhere the next supervisor finds and evicts it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["CLAIM", "LEASES", "LOCK", "LOG", "SPEC", "PostmasterFile", "Spec", "cluster_name", "server_processes"]

#: File names in a server's directory.
SPEC, LEASES, LOCK, CLAIM, LOG = "server.json", "leases", "supervisor.lock", "server.lock", "postgres.log"

#: Seconds between two looks at the leases.
POLL = 0.25

#: Seconds after which a postmaster that will not become ready, or will not end, is given up.
START_TIMEOUT, STOP_TIMEOUT = 60.0, 30.0

#: A postmaster that lived shorter than this (seconds) is started again only after a growing pause.
HEALTHY_AFTER = 1.0

#: A log beyond this size (bytes) is moved aside at the next start.
LOG_LIMIT = 10_000_000

_PR_SET_PDEATHSIG = 1


class SupervisorError(Exception):
    """The server could not be started; the message is passed on to the client."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to run, as whom, and for how long after the last lease."""

    command: list[str]
    data: str
    socket: str
    settings: dict[str, str]
    idle: float
    uid: int | None = None
    gid: int | None = None

    @classmethod
    def read(cls, directory: Path) -> Spec:
        return cls(**json.loads((directory / SPEC).read_text()))

    def write(self, directory: Path) -> None:
        new = directory / f"{SPEC}.new"
        new.write_text(json.dumps(asdict(self), indent=1))
        new.replace(directory / SPEC)


@dataclass(frozen=True, slots=True)
class PostmasterFile:
    """What ``postmaster.pid`` says; it may be out of date, as nobody removes it after a SIGKILL."""

    pid: int
    status: str

    @classmethod
    def read(cls, data: Path) -> PostmasterFile | None:
        """The file's content; None where there is none, or one that is just being written."""
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        if len(lines) < 8 or not lines[0].lstrip("-").isdigit():
            return None
        return cls(pid=abs(int(lines[0])), status=lines[7].strip())


def cluster_name(data: Path) -> str:
    """What every process of this server carries in its title, to be told from other servers by."""
    return "pgqrs-" + hashlib.sha256(os.fsencode(data)).hexdigest()[:16]


def _commands() -> Iterator[tuple[int, list[str]]]:
    """Every process' pid and arguments."""
    if sys.platform == "linux":
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    raw = Path(entry.path, "cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue  # gone, or hidden from us and so not ours
                yield int(entry.name), [os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0")]
    else:
        listing = subprocess.run(["ps", "-axo", "pid=,command="], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            pid, _, command = line.strip().partition(" ")
            yield int(pid), command.split(" ")


def server_processes(data: Path) -> dict[int, bool]:
    """The pids of the server over ``data``, living or orphaned; True for a postmaster."""
    title = f"postgres: {cluster_name(data)}:"
    found = {}
    for pid, argv in _commands():
        if " ".join(argv[:3]).startswith(title):
            found[pid] = False
        elif Path(argv[0]).name == "postgres" and str(data) in argv:
            found[pid] = True
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _try_exclusive(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def evict(data: Path, socket: Path, claim: int, timeout: float = STOP_TIMEOUT) -> None:
    """Stop what is left of an earlier server over ``data``, and remove its stale lock files.

    Postgres trusts the pid in those files: after a reboot or in a new container the number may belong to
    anybody, a killed postmaster may stay a zombie, and the server would refuse to start for ever. Here it is
    ``claim`` that decides, a descriptor of a file that the processes of a server inherit locked: it can be
    locked when the last of them is gone, including those in another container that we cannot see.
    """
    told: set[tuple[int, signal.Signals]] = set()
    started = time.monotonic()
    while (alive := server_processes(data)) or not _try_exclusive(claim):
        waited = time.monotonic() - started
        if waited > timeout:
            who = f"processes {sorted(alive)}" if alive else "processes (not visible from here)"
            raise SupervisorError(f"an earlier server's {who} over {data} do not end")
        postmasters = [pid for pid, is_postmaster in alive.items() if is_postmaster]
        if waited > timeout / 2:
            orders = [(pid, signal.SIGKILL) for pid in alive]
        elif postmasters:
            orders = [(pid, signal.SIGINT) for pid in postmasters]
        else:
            orders = [(pid, signal.SIGQUIT) for pid in alive]
        for order in orders:
            if order not in told:
                told.add(order)
                _signal(*order)
        time.sleep(0.01)
    for stale in (data / "postmaster.pid", socket.with_name(f"{socket.name}.lock")):
        stale.unlink(missing_ok=True)


def _tie_to_parent(number: signal.Signals, parent: int) -> Callable[[], None]:
    """A function that, run in a fresh child, asks Linux to signal it when its parent ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def tie() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(number))
            if os.getppid() != parent:  # it ended before the request was heard
                os._exit(1)

    return tie


class Supervisor:
    """Parent of one postmaster."""

    def __init__(self, directory: Path, spec: Spec) -> None:
        self.directory = directory
        self.spec = spec
        self.data = Path(spec.data)
        self.stopping = False
        self._server: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._short_lives = 0
        self._free_since: float | None = None
        self._leases = os.open(directory / LEASES, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._wakeup, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_stop(self, *_: object) -> None:
        self.stopping = True

    def start(self) -> None:
        """Start the postmaster and wait until it accepts connections, or somebody wants us to stop."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.stopping:
            claim = os.open(self.directory / CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                evict(self.data, Path(self.spec.socket), claim)
                log, begin = self._launch(claim)
            except OSError as error:
                raise SupervisorError(f"{self.spec.command[0]} cannot be run: {error}") from error
            finally:
                os.close(claim)
            if self._await_ready(log, begin, deadline):
                return
            self._pause()

    def _launch(self, claim: int) -> tuple[Path, int]:
        """Start the postmaster, which inherits ``claim``; return its log and where in it its own lines begin."""
        log = self.directory / LOG
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            begin = output.tell()
            self._server = subprocess.Popen(
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env={k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))},
                pass_fds=[claim],
                start_new_session=True,
                user=self.spec.uid,
                group=self.spec.gid,
                extra_groups=None if self.spec.uid is None else [],
                # Run after the change of user, which would clear the request. This process has no threads.
                preexec_fn=_tie_to_parent(signal.SIGINT, os.getpid()),
            )
        self._started_at = time.monotonic()
        return log, begin

    def _await_ready(self, log: Path, begin: int, deadline: float) -> bool:
        """False if somebody stopped or killed the postmaster before it was ready: worth another attempt."""
        assert self._server is not None
        while not self._ready():
            ended = self._server.poll()
            if ended is None and time.monotonic() < deadline:
                self._wait(0.01)
                continue
            self.stop()
            with log.open("rb") as output:
                output.seek(begin)
                said = output.read().decode(errors="replace")
            told = ended is not None and (ended <= 0 or "shutdown request" in said)
            if told and time.monotonic() < deadline:
                return False
            raise SupervisorError(f"postgres did not start (log: {log}):\n{said[-2000:]}")
        return True

    def _ready(self) -> bool:
        assert self._server is not None
        file = PostmasterFile.read(self.data)
        return file is not None and file.pid == self._server.pid and file.status == "ready"

    def _wait(self, seconds: float) -> None:
        """Sleep until a signal arrives, at most so long."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 4096)

    def watch(self) -> None:
        """Return when the server is to be stopped: asked to, or no lease for ``idle`` seconds."""
        while not self.stopping:
            self._wait(POLL)
            if self._server is None or self._server.poll() is not None:
                self._pause()
                self.start()
            if self._unused():
                return

    def _pause(self) -> None:
        """Wait before a restart, longer each time, if the postmasters die young."""
        lived = time.monotonic() - self._started_at
        self._short_lives = self._short_lives + 1 if lived < HEALTHY_AFTER else 0
        if self._short_lives > 1:
            self._wait(min(0.05 * 2**self._short_lives, 2.0))

    def _unused(self) -> bool:
        """Whether there has been no lease for long enough; if so the leases file stays locked."""
        if not _try_exclusive(self._leases):
            self._free_since = None
            return False
        now = time.monotonic()
        self._free_since = now if self._free_since is None else self._free_since
        if now - self._free_since >= self.spec.idle:
            return True
        fcntl.flock(self._leases, fcntl.LOCK_UN)
        return False

    def stop(self) -> None:
        """Stop the postmaster: fast, then immediate, then by force."""
        if self._server is None:
            return
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if self._server.poll() is None:
                self._server.send_signal(number)
                try:
                    self._server.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    continue
        self._server = None


def _report(message: str) -> None:
    """Tell the client, who reads one line of stdout, and the log; from then on only the log."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
    os.dup2(2, 1)


def supervise(directory: Path, lock: int) -> int:
    """Run one server to its end; ``lock`` is the inherited, locked descriptor of ``supervisor.lock``."""
    if os.fork():
        return 0  # the client waits for this process and need not reap the supervisor
    os.umask(0o077)  # the log quotes statements
    os.set_inheritable(lock, False)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    supervisor = Supervisor(directory, Spec.read(directory))
    try:
        supervisor.start()
        _report("ready")
        supervisor.watch()
    except SupervisorError as error:
        _report(str(error))
        return 1
    finally:
        supervisor.stop()
        os.ftruncate(lock, 0)
    return 0


def leash(parent: int, command: list[str]) -> None:
    """Become ``command``, which Linux stops with SIGTERM when ``parent`` ends."""
    _tie_to_parent(signal.SIGTERM, parent)()
    os.execv(command[0], command)


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        sys.exit(supervise(Path(sys.argv[2]), int(sys.argv[3])))
    leash(int(sys.argv[2]), sys.argv[3:])
