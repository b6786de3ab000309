"""Act one: a worker is killed in the middle of the second of three steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from examples.demo.app import fetch, pgqrs, save, transform, transformed
from examples.demo.screen import COLUMNS, Progress, Row, View
from examples.demo.stage import Claim, Stage
from examples.support import Entry
from pgqrs_celery import WorkflowRun

__all__ = ["TITLE", "play"]

TITLE = "A chain of three steps, and a worker that dies in the second"

SOURCE = Path(__file__).with_name("countries.csv")

#: Seconds; what is claimed. A worker's death is noticed in about two seconds, and machines may be busy.
SOON = 10.0


def play(stage: Stage) -> list[Claim]:
    """Run the pipeline, kill the worker that transforms, and return what held."""
    total = len(SOURCE.read_text("utf-8").splitlines()) - 1
    destination = stage.directory / "countries.json"
    stage.start_workers()
    canvas = fetch.s(str(SOURCE)) | transform.s() | save.s(str(destination))
    run = pgqrs.workflow("data_pipeline", canvas).delay()
    stage.screen.say(f"run {run.id} started: fetch | transform | save, {total} records")
    act = Act(stage, run, total)
    with stage.screen.live():
        first = stage.wait_for(act.in_the_middle, "the second step to be half done")
        victim = stage.name_of(first.worker)
        killed = stage.kill(victim)
        done = act.records_of(first)
        stage.screen.say(f"SIGKILL: {victim} (pid {first.worker}) is gone, {done} of {total} records into transform")
        second = stage.wait_for(lambda: act.resumed(first), "transform to begin on another worker")
        seconds = second.at - killed
        stage.screen.say(f"{stage.name_of(second.worker)} has taken transform over, {seconds:.2f} s after the kill")
        stage.wait_for(act.ended, "the run to end")
    result = run.get(timeout=5)
    stage.screen.say(f"run {run.id} is {run.status}: {result}")
    stage.screen.table(COLUMNS, [row.cells() for row in act.rows()])
    stage.screen.say(f"from the kill to the resumption: {seconds:.2f} s")
    return act.claims(first, second, seconds, destination)


class Act:
    """One run and its witnesses."""

    def __init__(self, stage: Stage, run: WorkflowRun, total: int) -> None:
        self.stage = stage
        self.run = run
        self.total = total

    def rows(self) -> list[Row]:
        """Return the steps as the ledger has them."""
        rows = []
        for step in self.run.steps():
            pid = int(step.worker.rpartition(" ")[2]) if step.worker else 0
            took = (
                (step.completed_at - step.started_at).total_seconds() if step.completed_at and step.started_at else None
            )
            worker = self.stage.name_of(pid) if pid else ""
            rows.append(Row(step.step_id, step.status, step.attempt, worker, took))
        return rows

    def executions(self) -> list[Entry]:
        """Return the beginnings of the second step, from the journal."""
        return self.stage.journal.read("transform begins")

    def records_of(self, execution: Entry) -> int:
        """Return how many records an execution of the second step has transformed, from the journal."""
        return sum(entry.pid == execution.pid for entry in self.stage.journal.read("record"))

    def look(self) -> None:
        """Show the present state."""
        progress = [
            Progress(f"transform on {self.stage.name_of(begun.worker)}", self.records_of(begun), self.total, "records")
            for begun in self.executions()
        ]
        self.stage.screen.update(View(self.rows(), progress))

    def in_the_middle(self) -> Entry | None:
        """Return the first execution of the second step as soon as it is a good third done."""
        self.look()
        begun = self.executions()
        return begun[0] if begun and self.records_of(begun[0]) >= self.total * 2 // 5 else None

    def resumed(self, first: Entry) -> Entry | None:
        """Return the execution that takes over from the first one."""
        self.look()
        return next((entry for entry in self.executions() if entry.pid != first.pid), None)

    def ended(self) -> bool:
        """Whether the run has ended."""
        self.look()
        return self.run.record.completed_at is not None

    def claims(self, first: Entry, second: Entry, seconds: float, destination: Path) -> list[Claim]:
        """Compare what the journal says with what was promised."""
        events = Counter(entry.event for entry in self.stage.journal.read())
        done = self.records_of(first)
        finished = self.stage.journal.read("transform ends")
        attempts = {row.step: row.attempts for row in self.rows()}
        saved = json.loads(destination.read_text("utf-8")) if destination.exists() else []
        names = [line.partition(",") for line in SOURCE.read_text("utf-8").splitlines()[1:]]
        expected = [transformed({"code": code, "name": name.strip('"')}) for code, _, name in names]
        return [
            Claim(
                0 < done < self.total,
                "the worker was killed in the middle of transform",
                f"journal: {done} of {self.total} records by pid {first.pid}, no end",
            ),
            Claim(
                events["fetch begins"] == events["fetch ends"] == 1,
                "fetch was skipped: its recorded result was used",
                f"journal: executed {events['fetch begins']} time(s)",
            ),
            Claim(
                events["transform begins"] == 2
                and [entry.pid for entry in finished] == [second.pid]
                and first.worker != second.worker,
                "transform was begun again by the other worker, and finished once",
                f"journal: begun {events['transform begins']} times, ended {len(finished)} time(s)",
            ),
            Claim(
                events["save begins"] == events["save ends"] == 1 and saved == expected,
                "save ran once, and every record is in its file",
                f"{len(saved)} records, equal to a computation of our own",
            ),
            Claim(
                self.run.status == "SUCCESS" and attempts == {"fetch": 1, "transform": 2, "save": 1},
                "the ledger tells the same story",
                ", ".join(f"{step}: {count}" for step, count in attempts.items()) + " attempt(s)",
            ),
            Claim(seconds < SOON, f"the step was resumed within {SOON:.0f} s of the kill", f"{seconds:.2f} s"),
        ]
