"""Act two: a chord of twenty, a worker that dies in its header, and a header that fails for good and is resumed."""

from __future__ import annotations

import time
from collections import Counter

from celery import chord

from examples.demo.app import Unreadable, collect, part, pgqrs
from examples.demo.pipeline import SOON, SOURCE
from examples.demo.screen import Progress, View
from examples.demo.stage import Claim, Stage
from examples.support import Entry
from pgqrs_celery import WorkflowRun

__all__ = ["TITLE", "play"]

TITLE = "A chord of twenty, a worker that dies in its header, and a part that fails"

PARTS = 20

#: Work per record: some tenths of a second per part, so that one can be cut short; or next to nothing.
SLOW, FAST = 50_000, 1_000

#: The part that cannot be read in the second half of the act.
BROKEN = 7


def play(stage: Stage) -> list[Claim]:
    """Play both halves."""
    stage.start_workers()
    return [*killed_in_the_header(stage), *failed_and_resumed(stage)]


class Half:
    """What happens from now on, by the journal."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._before = len(stage.journal.read())

    def start(self, iterations: int) -> WorkflowRun:
        """Start the chord."""
        header = [part.s(str(SOURCE), number, PARTS, iterations) for number in range(PARTS)]
        run = pgqrs.workflow("report", chord(header, collect.s())).delay()
        self.stage.screen.say(f"run {run.id} started: {PARTS} parts, and a body that collects them")
        return run

    def entries(self, event: str) -> list[Entry]:
        """Return the lines of an event."""
        return [entry for entry in self.stage.journal.read()[self._before :] if entry.event == event]

    def counts(self, event: str) -> Counter[str]:
        """Return how often an event happened to each part."""
        return Counter(entry.note for entry in self.entries(event))

    def look(self) -> None:
        """Show how far the header has come."""
        done = Counter(self.stage.name_of(entry.worker) for entry in self.entries("part ends"))
        self.stage.screen.update(View(progress=[Progress(name, done[name], PARTS, "parts") for name in sorted(done)]))

    def unfinished(self) -> list[Entry]:
        """Return the executions of parts that have not ended, once a third of the header is done."""
        self.look()
        ended = {(entry.note, entry.pid) for entry in self.entries("part ends")}
        if len(ended) < PARTS // 3:
            return []
        return [entry for entry in self.entries("part begins") if (entry.note, entry.pid) not in ended]

    def noticed(self, run: WorkflowRun) -> float | None:
        """Return the time once the ledger counts the death against a step."""
        self.look()
        return time.time() if any(step.lost for step in run.steps()) else None

    def ended(self, run: WorkflowRun) -> bool:
        """Whether the run has ended."""
        self.look()
        return run.record.completed_at is not None


def parts_in(run: WorkflowRun, status: str, worker: int) -> set[str]:
    """Return the numbers of the parts that a worker has in this status, as the ledger has them."""
    steps = [step for step in run.steps() if step.task_name == part.name and step.status == status]
    mine = [step for step in steps if step.worker and step.worker.endswith(f" {worker}")]
    # The steps of a canvas are named in its order: part, part#2, part#3 ...
    return {str(int(step.step_id.partition("#")[2] or 1) - 1) for step in mine}


def killed_in_the_header(stage: Stage) -> list[Claim]:
    """Kill a worker in the middle of the header."""
    half = Half(stage)
    run = half.start(SLOW)
    with stage.screen.live():
        victim = stage.wait_for(half.unfinished, "the header to be half done")[-1].worker
        killed = stage.kill(stage.name_of(victim))
        cut_short = parts_in(run, "RUNNING", victim)  # nobody has noticed yet
        done = half.counts("part ends")
        stage.screen.say(
            f"SIGKILL: {stage.name_of(victim)} (pid {victim}) is gone, with {len(done)} of {PARTS} parts done and "
            f"{len(cut_short)} cut short"
        )
        noticed = stage.wait_for(lambda: half.noticed(run), "the death to be noticed")
        seconds = noticed - killed
        stage.screen.say(f"noticed after {seconds:.2f} s; what was cut short waits in the queue again")
        stage.wait_for(lambda: half.ended(run), "the run to end")
    stage.screen.say(f"run {run.id} is {run.status}: {run.get(timeout=5)} records collected")
    finished = Counter(stage.name_of(entry.worker) for entry in half.entries("part ends"))
    stage.screen.table(("worker", "parts"), [(name, str(count)) for name, count in sorted(finished.items())])
    ends = half.counts("part ends")
    again = {number for number, count in half.counts("part begins").items() if count > 1}
    taken_over = {entry.note for entry in half.entries("part ends") if entry.worker != victim}
    return [
        Claim(
            bool(cut_short) and cut_short <= taken_over and again <= cut_short,
            "what was cut short was executed by the other worker, and nothing else was executed again",
            f"journal: {len(again)} of {PARTS} parts begun twice",
        ),
        Claim(seconds < SOON, f"the death was noticed within {SOON:.0f} s", f"{seconds:.2f} s"),
        Claim(
            len(ends) == PARTS and len(half.entries("collect")) == 1,
            "every part was finished, and the body ran once",
            f"journal: {len(ends)} parts, {len(half.entries('collect'))} body",
        ),
        Claim(
            run.status == "SUCCESS" and run.get(timeout=5) == len(SOURCE.read_text("utf-8").splitlines()) - 1,
            "the body got every record",
            f"{run.get(timeout=5)} records",
        ),
    ]


def failed_and_resumed(stage: Stage) -> list[Claim]:
    """Let a part fail for good, put it right, and resume."""
    half = Half(stage)
    obstacle = stage.journal.path.with_name(f"unreadable-{BROKEN}")
    obstacle.touch()
    run = half.start(FAST)
    with stage.screen.live():
        stage.wait_for(lambda: half.ended(run), "the run to fail")
    failed, early = run.status, len(half.entries("collect"))
    try:
        run.get(timeout=5)
        error = ""
    except Unreadable as unreadable:
        error = str(unreadable)
    stage.screen.say(f"run {run.id} is {failed}: {error} cannot be read; the body has not run")
    obstacle.unlink()
    run.resume()
    stage.screen.say(f"part {BROKEN} can be read again, the run is resumed")
    with stage.screen.live():
        stage.wait_for(lambda: run.status == "SUCCESS", "the run to succeed")
    stage.screen.say(f"run {run.id} is {run.status}: {run.get(timeout=5)} records collected")
    begins = half.counts("part begins")
    return [
        Claim(
            failed == "FAILED" and early == 0 and error == f"part {BROKEN}",
            "a part that failed for good failed the run, and the body did not run",
            f"{failed}, {early} bodies",
        ),
        Claim(
            begins == Counter({str(number): 2 if number == BROKEN else 1 for number in range(PARTS)}),
            "resumed, only the failed part was executed again",
            f"journal: part {BROKEN} begun {begins[str(BROKEN)]} times, {len(begins)} parts",
        ),
        Claim(
            len(half.entries("collect")) == 1 and run.status == "SUCCESS",
            "then the body ran, once",
            f"journal: {len(half.entries('collect'))} body",
        ),
    ]
