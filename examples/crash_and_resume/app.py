"""Two steps, the second of which can be made to die, or to fail, by a file beside the journal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from celery import Celery

from examples.support import Journal
from pgqrs_celery import Pgqrs

app = Celery("examples.crash_and_resume.app", broker="pgqrs://", backend="pgqrs://")
pgqrs = Pgqrs(app)


@pgqrs.task
def step_one(data: str) -> str:
    """Do the first half of the work."""
    Journal.of_environment().write("[step_one] Executing")
    return f"processed_{data}"


@pgqrs.task
def step_two(data: str) -> str:
    """Do the second half."""
    journal = Journal.of_environment()
    journal.write("[step_two] Executing")
    if taken(journal.path.with_name("kill")):
        journal.write("[step_two] SIGKILL")
        os.kill(os.getpid(), signal.SIGKILL)
    if journal.path.with_name("broken").exists():
        raise RuntimeError("Simulated crash!")
    return f"step2_{data}"


def taken(file: Path) -> bool:
    """Remove a file; whether it was there."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


crash_demo = pgqrs.workflow("crash_demo", step_one.s() | step_two.s())
