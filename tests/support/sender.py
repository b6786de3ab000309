"""A client process that sends a canvas, to be stopped and killed in the middle of that.

As a script it sends the canvas it finds, as JSON, on its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from celery.canvas import maybe_signature

from tests.support.processes import ROOT, start_process
from tests.support.scenario import Scenario

__all__ = ["Sender"]


class Sender:
    """A process that sends one canvas and ends; gone at the end of the ``with`` block."""

    def __init__(self, scenario: Scenario, canvas: Any) -> None:
        self._process = start_process(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, cwd=ROOT, env=scenario.environment()
        )
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(json.dumps(canvas).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout: float) -> int:
        """Wait until it has ended, and return its exit status."""
        return self._process.wait(timeout)


def send(text: str) -> None:
    """Send a canvas with the app of this process' scenario."""
    from tests.support.worker_app import app

    canvas: Any = maybe_signature(json.loads(text), app=app)
    canvas.apply_async()


if __name__ == "__main__":
    send(sys.stdin.read())
