"""Results: this package's backend against Redis and against Celery's own database backend, in one run.

    python -m benchmarks.results [--rounds 3] [--chord 1000] [--only ours redis db]

The same broker (an embedded Redis) and the same worker settings for all; only ``one`` has our broker beside our
backend, on one Postgres. The candidates take turns, round by round, because a machine is never equally fast for long. A
latency is the median over all rounds. Statements and connections are counted afterwards, untimed, from the log of a
Postgres that logs each of them.

Celery's database backend polls. ``db`` is what its users get, with Celery's default interval of half a second; ``db10``
asks every 10 ms, which costs it a connection each time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery, chord, group

from benchmarks._tasks import BACKEND, BROKER, make_app
from pgqrs_celery import embedded

ROOT = Path(__file__).resolve().parents[1]
STATEMENT = re.compile(r"LOG:  (?:statement|execute [^:]*): (?!BEGIN|COMMIT|ROLLBACK)")
CONNECTION = "LOG:  connection authorized"

CANDIDATES = ("redis", "ours", "one", "db", "db10")

#: Targets: what our figure may be, as a multiple of another candidate's.
TARGETS = {("round trip", "redis"): 1.2, ("group of 20", "db"): 0.1, ("chord of 20", "db"): 0.1}
#: Whose figures: with the broker of all others, and with our own.
OURS = ("ours", "one")


@dataclass
class Candidate:
    """A result backend with an app on it."""

    name: str
    app: Celery
    broker: str
    backend: str
    interval: float = 0.5
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def sig(self, name: str, *args: Any) -> Any:
        """Return a signature of this candidate's app."""
        return self.app.signature(name, args, app=self.app)


def round_trip(candidate: Candidate) -> None:
    """One task, sent and waited for."""
    assert candidate.sig("add", 1, 2).apply_async().get(timeout=60, interval=candidate.interval) == 3


def group_of(n: int) -> Callable[[Candidate], None]:
    """A group, sent and joined."""

    def run(candidate: Candidate) -> None:
        members = group((candidate.sig("add", k, k) for k in range(n)), app=candidate.app)
        assert members.apply_async().get(timeout=120, interval=candidate.interval) == [2 * k for k in range(n)]

    return run


def chord_of(n: int) -> Callable[[Candidate], None]:
    """A chord, sent; its body's result waited for."""

    def run(candidate: Candidate) -> None:
        header = [candidate.sig("add", k, k) for k in range(n)]
        result = chord(header, candidate.sig("total"), app=candidate.app).apply_async()
        assert result.get(timeout=300, interval=candidate.interval) == n * (n - 1)

    return run


@contextmanager
def worker(candidate: Candidate, concurrency: int) -> Iterator[None]:
    """A prefork worker of the candidate's own."""
    command = [sys.executable, "-m", "celery", "-A", "benchmarks._tasks", "worker", "-c", str(concurrency)]
    command += ["--loglevel", "ERROR", "-n", f"{candidate.name}@bench"]
    environment = {**os.environ, BROKER: candidate.broker, BACKEND: candidate.backend}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not candidate.app.control.ping(timeout=0.5):
            if time.monotonic() > deadline:
                raise SystemExit(f"the worker of {candidate.name} does not answer")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure(candidates: list[Candidate], arguments: argparse.Namespace) -> None:
    """Time every operation on every candidate, in turns."""
    operations = [
        ("round trip", round_trip, arguments.trips),
        ("group of 20", group_of(20), 10),
        ("chord of 20", chord_of(20), 10),
        (f"chord of {arguments.chord}", chord_of(arguments.chord), 1),
    ]
    with ExitStack() as stack:
        for candidate in candidates:
            stack.enter_context(worker(candidate, arguments.concurrency))
            for operation in (round_trip, group_of(20), chord_of(20)):
                operation(candidate)
        for number in range(arguments.rounds):
            for name, run, times in operations:
                for candidate in candidates:
                    for _ in range(times if not candidate.name.startswith("db") else max(1, times // 5)):
                        began = time.perf_counter()
                        run(candidate)
                        candidate.figures[name].append(time.perf_counter() - began)
            print(f"round {number + 1} of {arguments.rounds} done", flush=True)


def fastest(times: list[float]) -> float:
    """Return the time that only a tenth of them undercut: what is left when nothing else uses the machine."""
    return sorted(times)[len(times) // 10]


def report(candidates: list[Candidate]) -> None:
    """Print medians and fastest tenths, and what the targets make of the medians."""
    names = list(candidates[0].figures)
    for title, summary in (("median, ms", statistics.median), ("fastest tenth", fastest)):
        print(f"\n{title:16}" + "".join(f"{c.name:>12}" for c in candidates))
        for name in names:
            print(f"{name:16}" + "".join(f"{summary(c.figures[name]) * 1000:12.1f}" for c in candidates))
    print()
    figures = {(name, c.name): c.figures[name] for name in names for c in candidates}
    for ((name, other), limit), own in itertools.product(TARGETS.items(), OURS):
        if (name, other) in figures and (name, own) in figures:
            ratio, best = (s(figures[name, own]) / s(figures[name, other]) for s in (statistics.median, fastest))
            verdict = "reached" if ratio <= limit else "MISSED"
            text = f"{ratio:.2f} x {other}, fastest tenth {best:.2f} x (target: at most {limit:g} x): {verdict}"
            print(f"{name}, {own}: {text}")


def count(candidates: list[Candidate], logs: dict[str, Path], concurrency: int) -> None:
    """Print statements and connections per operation, driver and worker together."""
    print(f"\n{'per operation':16}" + "".join(f"{c.name + ' stmts':>14}{'conns':>8}" for c in candidates))
    operations = [("round trip", round_trip, 20), ("group of 20", group_of(20), 5), ("chord of 20", chord_of(20), 5)]
    rows: dict[str, str] = {name: f"{name:16}" for name, _, _ in operations}
    for candidate in candidates:
        with worker(candidate, concurrency):
            for _ in range(3):
                chord_of(20)(candidate)
            for name, run, times in operations:
                path = logs[candidate.name]
                start = path.stat().st_size
                for _ in range(times):
                    run(candidate)
                with path.open(errors="replace") as log:
                    log.seek(start)
                    lines = log.readlines()
                statements = sum(1 for line in lines if STATEMENT.search(line))
                connections = sum(1 for line in lines if CONNECTION in line)
                rows[name] += f"{statements / times:14.1f}{connections / times:8.1f}"
    print("\n".join(rows.values()))
    print("(without BEGIN, COMMIT and ROLLBACK)")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser("benchmarks.results", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trips", type=int, default=100, help="round trips in a round")
    parser.add_argument("--chord", type=int, default=1000, help="members of the large chord")
    parser.add_argument("--concurrency", type=int, default=2, help="processes of a worker")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    arguments = parser.parse_args()
    home = embedded.new_directory("pgqrs-bench-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        redis = stack.enter_context(embedded.redis_server())

        def serve(name: str, **settings: str) -> embedded.PostgresServer:
            server = stack.enter_context(embedded.PostgresServer(home / name, settings=settings)).start()
            stack.callback(server.stop)
            return server

        def candidates(server: embedded.PostgresServer, first: int) -> list[Candidate]:
            own = f"pgqrs+{server.dsn()}&pgqrs_auto_install=true"
            backends = {
                "redis": redis.database_url(first),
                "ours": own,
                "one": own,
                "db": f"db+{server.dsn(driver='psycopg')}",
                "db10": f"db+{server.dsn(driver='psycopg')}",
            }
            made = []
            for number, name in enumerate(arguments.only, first + 1):
                broker = own if name == "one" else redis.database_url(number)
                interval = 0.01 if name == "db10" else 0.5
                made.append(Candidate(name, make_app(broker, backends[name]), broker, backends[name], interval))
            return made

        timed = candidates(serve("timed"), 0)
        measure(timed, arguments)
        report(timed)
        logging = serve("logging", log_statement="all", log_connections="on", max_connections="200")
        counted = [c for c in candidates(logging, 5) if c.name != "redis"]
        count(counted, {c.name: home / "logging" / "postgres.log" for c in counted}, arguments.concurrency)


if __name__ == "__main__":
    main()
