"""The hot statements of the ledger with a long past, against an empty database.

    python -m benchmarks.hot_statements [--finished 1000000] [--waiting 100000] [--rounds 2000]

Two schemas of one embedded Postgres: one is empty, the other holds ``--finished`` finished runs of one step and
``--waiting`` steps that wait for their time. The statements of a step's life are executed in both, in turns, each on a
step of its own; the figures are medians in microseconds, the ratio is full against empty (target: at most 1.2).
Postgres does not wait for the disk here (fsync = off), so that nothing hides what a statement costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

from benchmarks.support.measure import machine
from benchmarks.support.volume import analyze, fill
from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from pgqrs_celery.store import clock, leases, migrations, recording, runs, steps
from pgqrs_celery.store.recording import Finished, NewStep
from pgqrs_celery.store.runs import NewRun

TARGET = 1.2
LEASE = 30.0
SETTINGS = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "512MB", "autovacuum": "off"}

Times = dict[str, list[float]]


class Side:
    """One schema, and how long its statements took."""

    def __init__(self, database: Database) -> None:
        migrations.install(database)
        self.session = Session(database.connect(), database.texts)
        self.times: Times = defaultdict(list)
        self.worker_id = uuid4()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long something took."""
        began = time.perf_counter()
        yield
        self.times[name].append(1e6 * (time.perf_counter() - began))

    def life(self, number: int) -> None:
        """Let two steps of one run go from their record to their end, and look at what is due meanwhile."""
        first, second = f"step-{number}-1", f"step-{number}-2"
        with self.timed("start a run"):
            started = runs.start(self.session, NewRun("shop", first, "pack"), [self.step(first)])
        assert started is not None
        workflow_id, token = started[0], uuid4()
        self.acquire(first, token)
        with self.timed("renew a lease"):
            leases.renew(self.session, [first], worker_id=self.worker_id, lease=LEASE * 3)
        with self.timed("succeed, record the next"):
            recording.record(
                self.session,
                [self.step(second)],
                workflow_id=workflow_id,
                app="shop",
                lease_token=token,
                finished=Finished(first, "42"),
            )
        with self.timed("hand off"):
            steps.hand_off(self.session, first, fence=1)
        token = uuid4()
        self.acquire(second, token)
        with self.timed("succeed"):
            steps.succeed(self.session, second, lease_token=token, output="42")
        steps.hand_off(self.session, second, fence=1)
        with self.timed("look and close the run"):
            assert runs.close_if_quiet(self.session, workflow_id) == "SUCCESS"
        with self.timed("relay: what is due"):
            assert self.claim() == 0
        with self.timed("relay: when is the next"):
            clock.next_due(self.session, app="shop", may_judge=True, back=5.0)
        with self.timed("relay: the backstop's look"):
            runs.stuck(self.session, app="shop", after=workflow_id - 1, age=2.0, batch=500)

    @staticmethod
    def step(task_id: str) -> NewStep:
        """A step as it is recorded."""
        return NewStep(task_id, task_id, "shop.pack", 0, '{"name": "shop.pack"}', "celery", 10.0, True)

    def acquire(self, task_id: str, token: object) -> None:
        """Take a step."""
        with self.timed("acquire"):
            steps.acquire(
                self.session,
                task_id,
                generation=0,
                lease_token=token,  # type: ignore[arg-type]
                worker_id=self.worker_id,
                lease=LEASE,
                max_lost=5,
                poison="{}",
                may_judge=True,
            )

    def claim(self) -> int:
        """Look for what is due; returns how much it is."""
        due = clock.claim_due(
            self.session,
            app="shop",
            may_judge=True,
            batch=100,
            max_lost=5,
            poison="{}",
            interval=10.0,
            interval_max=600.0,
            back=5.0,
        )
        return len(due)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("benchmarks.hot_statements", description=__doc__)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    print(machine())
    home = embedded.new_directory("pgqrs-bench-")
    server = embedded.PostgresServer(home / "postgres", settings=SETTINGS)
    server.start()
    try:
        empty, full = (Side(Database(server.dsn(), schema=schema)) for schema in ("empty", "full"))
        prepare(full, options.finished, options.waiting)
        compete({"empty": empty, "full": full}, options.rounds)
        report(empty.times, full.times, options.finished, options.waiting)
    finally:
        server.stop()


def prepare(side: Side, finished: int, waiting: int) -> None:
    """Give a schema its past."""
    began = time.perf_counter()
    fill(side.session, "full", prefix="d", runs=finished, steps=1, finished=True)
    fill(side.session, "full", prefix="w", runs=max(1, waiting // 10), steps=10, finished=False)
    analyze(side.session, "full")
    print(f"{finished} finished runs and {waiting} waiting steps entered in {time.perf_counter() - began:.0f} s")


def compete(sides: dict[str, Side], rounds: int) -> None:
    """Let the sides live the same life in turns; the first tenth warms up."""
    turns: list[Callable[[int], None]] = [side.life for side in sides.values()]
    for number in range(rounds):
        if number == rounds // 10:
            for side in sides.values():
                side.times.clear()
        for turn in turns if number % 2 else reversed(turns):
            turn(number)


def report(empty: Times, full: Times, finished: int, waiting: int) -> None:
    """Print the medians side by side."""
    print(f"\n{'microseconds (median)':28} {'empty':>8} {'full':>8} {'ratio':>6}   ({finished} + {waiting})")
    ratios = []
    for name, times in empty.items():
        one, other = statistics.median(times), statistics.median(full[name])
        ratios.append(other / one)
        print(
            f"{name:28} {one:8.0f} {other:8.0f} {other / one:6.2f}{'' if other / one <= TARGET else '  above target'}"
        )
    total = sum(map(statistics.median, full.values())) / sum(map(statistics.median, empty.values()))
    print(f"{'a step, all in all':28} {'':8} {'':8} {total:6.2f}   worst statement {max(ratios):.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
