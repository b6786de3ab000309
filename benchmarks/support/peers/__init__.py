"""Other engines: installed into an environment of their own, talked to through pipes."""

from __future__ import annotations

import json
import signal
import subprocess
import venv
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["PEERS", "Form", "Peer", "PeerKind", "environment"]

HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Form:
    """One way to run a peer: its title, a name for its database, and options of its program."""

    title: str
    database: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerKind:
    """A peer: what to install, its program, and the forms it competes in."""

    packages: tuple[str, ...]
    program: str
    forms: tuple[Form, ...]


PEERS: Final[dict[str, PeerKind]] = {
    "dbos": PeerKind(
        ("dbos", "psycopg[binary]"),
        "dbos_side.py",
        (
            Form("DBOS, polls every 20 ms / 5 ms", "dbos_tuned", ("--tuned",)),
            Form("DBOS, defaults", "dbos_defaults"),
        ),
    ),
    "absurd": PeerKind(
        ("absurd-sdk", "absurdctl", "psycopg[binary]"),
        "absurd_side.py",
        (
            Form("absurd, 2 x 4 connections, 20 ms / 5 ms", "absurd_four", ("--tuned", "--connections", "4")),
            Form("absurd, 2 x 1 connection, 20 ms / 5 ms", "absurd_one", ("--tuned",)),
            Form("absurd, defaults", "absurd_defaults"),
        ),
    ),
    "pgqrs": PeerKind(("pgqrs",), "pgqrs_side.py", (Form("pgqrs", "pgqrs_peer"),)),
}


def environment(directory: Path, names: Sequence[str]) -> Path:
    """Install peers from the package index; returns the interpreter to run them with."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    packages = sorted({package for name in names for package in PEERS[name].packages})
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    installed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    print(
        "peers: " + ", ".join(line for line in installed.stdout.split() if line.partition("==")[0] in packages),
        flush=True,
    )
    return python


class Peer:
    """Two worker processes and a client process of one peer in one form."""

    def __init__(self, kind: PeerKind, form: Form, python: Path, dsn: str) -> None:
        self.title = form.title
        self._command = [str(python), str(HERE / kind.program)]
        self._arguments = [dsn, *form.options]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        subprocess.run([*self._command, "setup", *self._arguments], check=True, stdout=subprocess.DEVNULL)
        self._workers = [self._start("worker", "--name", name) for name in ("a", "b")]
        self._client = self._start("client")
        return self

    def _start(self, role: str, *options: str) -> subprocess.Popen[str]:
        command = [*self._command, role, *self._arguments, *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        while (line := self._read(process)) != "ready":
            print(f"{self.title}: {line}")
        return process

    def _read(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.title}: a process has ended with status {process.wait()}")
        return line.strip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def many(self, workflows: int, steps: int) -> float:
        """Enqueue so many at once and return the seconds until the last result is back."""
        return self._ask(f"many {workflows} {steps}")[0]

    def singles(self, workflows: int, steps: int) -> list[float]:
        """Enqueue them one after the other, and return the seconds each has taken."""
        return self._ask(f"singles {workflows} {steps}")

    def rest(self) -> None:
        """Stop workers and client where they are."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in (*self._workers, self._client):
            process.send_signal(number)

    def _ask(self, line: str) -> list[float]:
        assert self._client.stdin is not None
        print(line, file=self._client.stdin, flush=True)
        answer = self._read(self._client)
        return [float(seconds) for seconds in json.loads(answer)]
