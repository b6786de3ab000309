"""What happens to a run whose step is killed, and to one whose step fails.

Run it with ``python -m examples.crash_and_resume``. Expected output (the numbers vary)::

    === A step is killed ===
    Started run 1
    [step_one] Executing
    [step_two] Executing
    [step_two] SIGKILL
    [step_two] Executing
    Result: step2_processed_test
    step_one: 1 attempt(s), 0 lost, SUCCESS
    step_two: 2 attempt(s), 1 lost, SUCCESS

    === A step fails ===
    Started run 2
    [step_one] Executing
    [step_two] Executing
    Caught: Simulated crash!
    The run is FAILED

    === The cause is removed, the run resumed ===
    [step_two] Executing
    Result: step2_processed_test
    step_one: 1 attempt(s), 0 lost, SUCCESS
    step_two: 2 attempt(s), 0 lost, SUCCESS

``step_one`` is executed once in either run: its recorded result is used.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from examples.crash_and_resume.app import app, crash_demo
from examples.support import JOURNAL, Journal, Worker
from pgqrs_celery import WorkflowRun


class Reader:
    """Prints what has been added to a journal since the last time."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._printed = 0

    def show(self) -> None:
        entries = self.journal.read()
        for entry in entries[self._printed :]:
            print(entry.event)
        self._printed = len(entries)


def show_steps(run: WorkflowRun) -> None:
    for step in run.steps():
        print(f"{step.step_id}: {step.attempt} attempt(s), {step.lost} lost, {step.status}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory, "journal"))
        os.environ[JOURNAL] = str(journal.path)
        with Worker(app):
            tell(journal)


def tell(journal: Journal) -> None:
    reader = Reader(journal)

    print("=== A step is killed ===")
    journal.path.with_name("kill").touch()
    run = crash_demo.delay("test")
    print(f"Started run {run.id}")
    result = run.get(timeout=60)
    reader.show()
    print(f"Result: {result}")
    show_steps(run)

    print("\n=== A step fails ===")
    journal.path.with_name("broken").touch()
    run = crash_demo.delay("test")
    print(f"Started run {run.id}")
    try:
        run.get(timeout=60)
    except RuntimeError as error:
        reader.show()
        print(f"Caught: {error}")
    print(f"The run is {run.status}")

    print("\n=== The cause is removed, the run resumed ===")
    journal.path.with_name("broken").unlink()
    result = run.resume().get(timeout=60)
    reader.show()
    print(f"Result: {result}")
    show_steps(run)


if __name__ == "__main__":
    main()
