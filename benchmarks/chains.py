"""Durable chains against plain ones, and the time from a SIGKILL to the resumption.

    python -m benchmarks.chains [--sides plain durable ...] [--rounds 3] [--chains 100] [--links 10] [--events]
    python -m benchmarks.chains --kill 10 [--victim worker|child]

Every side has one worker (prefork, two processes, or ``--concurrency``). They compete in turns, in every round: first
``--chains`` chains
at once (steps/s and processor time), then ``--singles`` one after the other (latency of a whole chain). The figures are
medians over the rounds with the smallest and the largest; the ratio is the median of each round's ratio to the first
side. "others" is what the rest of the machine used meanwhile: where it is not small, repeat the measurement.
"""

from __future__ import annotations

import argparse
import io
import pstats
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from celery import chain

from benchmarks.support.arena import SIDES, Contestant, Servers, servers
from benchmarks.support.measure import Usage, machine, spread
from examples.support import Entry, wait_for

PARTS = ("client", "main", "pool", "postgres", "redis")


@dataclass(slots=True)
class Score:
    """What one side has done, round by round."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    steps: int = 0
    runs: int = 0


def canvas(contestant: Contestant, links: int) -> chain:
    """Return a chain of steps that cost nothing."""
    step = contestant.app.tasks["increment"]
    return chain(step.s(0), *(step.s() for _ in range(links - 1)))


def throughput(contestant: Contestant, score: Score, chains: int, links: int) -> None:
    """Start many chains at once and wait for all of them."""
    meter, began = contestant.meter(), time.perf_counter()
    results = [canvas(contestant, links).apply_async() for _ in range(chains)]
    outcomes = [result.get(timeout=300) for result in results]
    seconds = time.perf_counter() - began
    assert outcomes == [links] * chains
    score.usages.append(meter.stop())
    score.rates.append(chains * links / seconds)
    score.steps += chains * links
    score.runs += chains


def latency(contestant: Contestant, score: Score, singles: int, links: int) -> None:
    """Run chains one after the other, and keep the median."""
    times = []
    for _ in range(singles):
        began = time.perf_counter()
        assert canvas(contestant, links).apply_async().get(timeout=60) == links
        times.append(1000 * (time.perf_counter() - began))
    score.latencies.append(statistics.median(times))
    score.runs += singles


def compete(contestants: Sequence[Contestant], arguments: argparse.Namespace) -> dict[str, Score]:
    """Let the sides compete, in turns."""
    scores = {contestant.side.name: Score() for contestant in contestants}
    for contestant in contestants:
        contestant.start_worker("bench")
    for contestant in contestants:  # caches, prepared statements, connections
        latency(contestant, scores[contestant.side.name], arguments.singles, arguments.links)
        scores[contestant.side.name].latencies.clear()
    for number in range(arguments.rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            score = scores[contestant.side.name]
            throughput(contestant, score, arguments.chains, arguments.links)
            latency(contestant, score, arguments.singles, arguments.links)
            print(
                f"round {number + 1}  {contestant.side.name:11} {score.rates[-1]:5.0f} steps/s "
                f"{score.latencies[-1]:6.1f} ms",
                flush=True,
            )
    for contestant in contestants:
        if line := contestant.check(scores[contestant.side.name].runs):
            print(line)
    return scores


def report(contestants: Sequence[Contestant], scores: dict[str, Score], arguments: argparse.Namespace) -> None:
    """Print the table."""
    first = scores[contestants[0].side.name]
    per_round = arguments.chains * arguments.links
    shape = f"{arguments.chains} chains x {arguments.links} steps, {arguments.concurrency} processes"
    print(f"\n{machine()}; {arguments.rounds} rounds of {shape}")
    head = ("side", "steps/s", "ratio", "p50 of a chain, ms", "CPU-ms/step: " + " + ".join(PARTS), "others")
    rows = [head]
    for contestant in contestants:
        score = scores[contestant.side.name]
        ratios = [own / other for own, other in zip(score.rates, first.rates, strict=True)]
        total = statistics.median(usage.total for usage in score.usages) * 1000 / per_round
        parts = [statistics.median(usage.parts[part] for usage in score.usages) * 1000 / per_round for part in PARTS]
        others = statistics.median(
            usage.others / (per_round / rate) for usage, rate in zip(score.usages, score.rates, strict=True)
        )
        rows.append(
            (
                contestant.side.title,
                spread(score.rates),
                f"{statistics.median(ratios):.2f}",
                spread(score.latencies, 1),
                f"{total:.2f} = " + " + ".join(f"{part:.2f}" for part in parts),
                f"{others:.2f} cores",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_profile(contestant: Contestant) -> None:
    """Print where the processes of the pool spent their time."""
    files = [str(path) for path in contestant.profiles]
    if not files:
        return
    out = io.StringIO()
    statistics_of_all = pstats.Stats(*files, stream=out)
    statistics_of_all.strip_dirs().sort_stats("tottime").print_stats(40)
    statistics_of_all.sort_stats("cumulative").print_stats(40)
    print(f"\n=== {contestant.side.title}: {len(files)} processes of the pool ===\n{out.getvalue()}")


def kill(the_servers: Servers, contestant: Contestant, times: int, victim: str) -> list[float]:
    """Kill who executes a step, so many times; return the seconds until somebody has begun it again."""
    seconds = []
    fleet = {worker.pid: worker for worker in (contestant.start_worker("bench-0"), contestant.start_worker("bench-1"))}
    for worker in fleet.values():
        worker.ready()
    step, hold = contestant.app.tasks["increment"], contestant.app.tasks["hold"]
    for number in range(times):
        flag = the_servers.directory / f"flag-{number}"
        result = chain(step.s(0), hold.si(str(flag)), step.s()).apply_async()
        first = nth_execution(the_servers, 2 * number)
        # A worker's rhythm begins with its start, and the last one has just been started: without this, every kill
        # would come at the same point of it.
        time.sleep(random.uniform(0.0, contestant.watch_interval))
        if victim == "worker":
            moment = fleet.pop(first.worker).kill()
        else:
            moment = time.time()
            fleet[first.worker].kill_child(first.pid)
        second = nth_execution(the_servers, 2 * number + 1)
        seconds.append(second.at - moment)
        print(f"{number + 1:3}  SIGKILL of a {victim}: begun again after {seconds[-1]:.2f} s", flush=True)
        flag.touch()
        assert result.get(timeout=60) == 1
        if victim == "worker":
            worker = contestant.start_worker(f"bench-{number + 2}")
            fleet[worker.pid] = worker.ready()
    return seconds


def nth_execution(the_servers: Servers, which: int) -> Entry:
    """Return an execution of the step that waits, as soon as it has begun."""

    def begun() -> Entry | None:
        entries = the_servers.journal.read("hold")
        return entries[which] if len(entries) > which else None

    return wait_for(begun, "the step to begin")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.chains", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=sorted(SIDES), default=["plain", "durable"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--links", type=int, default=10)
    parser.add_argument("--singles", type=int, default=30)
    parser.add_argument("--concurrency", type=int, default=2, help="processes of the pool of each side's worker")
    parser.add_argument(
        "--events", action="store_true", help="the workers send task events (-E), with nobody listening"
    )
    parser.add_argument("--profile", action="store_true", help="print a cProfile of the pool's processes")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="measure N resumptions instead")
    parser.add_argument("--victim", choices=["worker", "child"], default="worker", help="who is killed")
    return parser.parse_args()


def main() -> int:
    arguments = options()
    with ExitStack() as stack:
        the_servers = stack.enter_context(servers())
        if arguments.kill:
            side = next(name for name in arguments.sides if name != "plain")
            contestant = Contestant(the_servers, SIDES[side](the_servers))
            stack.callback(contestant.stop)
            seconds = kill(the_servers, contestant, arguments.kill, arguments.victim)
            print(
                f"\n{machine()}\n{contestant.side.title}: SIGKILL of a {arguments.victim} -> begun again: "
                f"{spread(seconds, 2)} s, n = {len(seconds)}"
            )
            return 0
        contestants = [
            Contestant(
                the_servers,
                SIDES[name](the_servers),
                concurrency=arguments.concurrency,
                profile=arguments.profile,
                events=arguments.events,
            )
            for name in arguments.sides
        ]
        for contestant in contestants:
            stack.callback(contestant.stop)
        scores = compete(contestants, arguments)
        report(contestants, scores, arguments)
        for contestant in contestants:
            contestant.stop()
            show_profile(contestant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
