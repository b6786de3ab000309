"""Python programs without the wait for their imports: forked from a process that has made them already.

That process (multiprocessing's fork server) has imported what a worker imports, and has done nothing with it: what it
forks runs the same code in a session of its own as ``python -m`` would. That the package works where nobody imports it
is for programs to show that are started without it.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, start_process

__all__ = ["ForkedProgram", "start_celery"]

#: What a worker imports, with all commands of ``celery``: the package under test has one, and a name for its broker.
LIBRARIES = [
    *("billiard.popen_fork", "billiard.sharedctypes", "billiard.synchronize", "celery.app.amqp", "celery.app.base"),
    *("celery.app.control", "celery.app.events", "celery.app.log", "celery.apps.worker", "celery.backends.redis"),
    *("celery.bin.celery", "celery.concurrency.prefork", "celery.concurrency.thread", "celery.concurrency.solo"),
    *("celery.events.state", "celery.worker.autoscale", "celery.worker.consumer", "celery.worker.control"),
    *("celery.worker.consumer.delayed_delivery", "celery.worker.strategy", "click_repl", "flower.command"),
    *("kombu.transport.pyamqp", "kombu.transport.redis", "psycopg", "redis.asyncio"),
    *("sqlalchemy.dialects.postgresql", "sqlalchemy.orm"),
    *("pgqrs_celery", "pgqrs_celery.backend", "pgqrs_celery.inspection", "pgqrs_celery.request"),
    *("pgqrs_celery.transport", "tests.support.scenario"),
]

GREEN = {"gevent", "eventlet"}

PR_SET_PDEATHSIG = 1


@cache
def nursery() -> ForkServerContext:
    """Return the context of this process's fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, "tests.support.still"])
    return context


class ForkedProgram:
    """A running ``python -m module arguments``, with as much of ``subprocess.Popen`` as tests use."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], output: Path
    ) -> None:
        self._process: Any = nursery().Process(target=_become, args=(module, list(arguments), cwd, dict(env), output))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        status: int | None = self._process.exitcode
        return status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status; raises ``TimeoutExpired``."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start_celery(
    arguments: Sequence[str], *, env: Mapping[str, str], output: Path
) -> ForkedProgram | subprocess.Popen[bytes]:
    """Start ``celery arguments`` in a process group of its own; what it prints goes to a file.

    Green pools replace parts of the standard library before anything else is imported, and are not forked.
    """
    output.touch()
    if not GREEN.intersection(arguments):
        return ForkedProgram("celery", arguments, cwd=ROOT, env=env, output=output)
    command = [sys.executable, "-m", "celery", *arguments]
    with output.open("wb") as file:
        return start_process(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT, env=env)


def _become(module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path) -> None:
    """Make this fork what a program started from a shell would be, and run the module."""
    os.setsid()
    if sys.platform == "linux":  # the nursery ends with the tests, however they end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)
    for descriptor in {nothing, log} - {0, 1, 2}:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
