"""Steps inside a function, and queued functions, against other engines on the same Postgres.

    python -m benchmarks.steps [--rounds 5] [--steps 1000]
    python -m benchmarks.steps --queued [--workflows 200] [--steps 10] [--singles 20] [--peers dbos ...]

Without ``--queued``: ``--steps`` trivial steps in one function, each committed, against as many bare committing INSERTs
through psycopg, in turns. With it: ``--workflows`` functions of ``--steps`` trivial steps, from the first enqueue until
the last result is back, with two worker processes; then ``--singles`` one after the other. Peers are installed from the
package index into an environment that vanishes afterwards; each competes with its defaults and with the settings that
make it fastest; while it is not its turn, its processes are stopped. The figures are medians over the rounds with the
smallest and the largest.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg

from benchmarks.support.application import Side, make_app, plus_one
from benchmarks.support.arena import Contestant, Servers, servers
from benchmarks.support.measure import machine, spread
from benchmarks.support.peers import PEERS, Peer, environment
from benchmarks.support.queued import OURS, Own, Queued

#: Steps, and bare INSERTs, in one turn: short enough that both sides see the same machine.
CHUNK = 50


class Clock:
    """Adds up the seconds of one side's turns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


class Floor:
    """Bare INSERTs that commit one by one: what nothing durable can do without."""

    STATEMENT = "INSERT INTO bare (run, step, value) VALUES (%s, %s, %s)"

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        connection.execute("CREATE TABLE bare (run int, step text, value json, PRIMARY KEY (run, step))")
        self._run = 0

    def begin(self) -> Clock:
        """Begin a run; returns its clock."""
        self._run, self._step, self.clock = self._run + 1, 0, Clock()
        return self.clock

    def insert(self) -> None:
        """Take a turn."""
        with self.clock:
            for _ in range(CHUNK):
                self._step += 1
                self._connection.execute(self.STATEMENT, (self._run, f"step#{self._step}", str(self._step)))


def functions(pgqrs: Any, floor: Floor) -> dict[str, Callable[[int], float]]:
    """Return functions that execute so many steps in turns with the floor; each returns its own seconds."""

    @pgqrs.workflow(name="turns")
    def turns(ctx: Any, steps: int) -> float:
        clock, number = Clock(), 0
        for _ in range(steps // CHUNK):
            with clock:
                for _ in range(CHUNK):
                    number = plus_one(ctx, number)
            floor.insert()
        assert number == steps
        return clock.seconds

    @pgqrs.workflow(name="turns_async")
    async def turns_async(ctx: Any, steps: int) -> float:
        clock, number = Clock(), 0
        for _ in range(steps // CHUNK):
            with clock:
                for _ in range(CHUNK):
                    number = await plus_one(ctx, number)
            floor.insert()
        assert number == steps
        return clock.seconds

    return {
        "step": lambda steps: turns(pgqrs.context(turns), steps),
        "step, async def": lambda steps: asyncio.run(turns_async(pgqrs.context(turns_async), steps)),
    }


def inside(the_servers: Servers, arguments: argparse.Namespace) -> None:
    """Compare steps in a function with bare INSERTs."""
    dsn = the_servers.database("inside")
    app = make_app(Side("inside", "", "memory://", "cache+memory://", dsn))
    pgqrs: Any = app.pgqrs  # type: ignore[attr-defined]
    pgqrs.install()
    with psycopg.connect(dsn, autocommit=True) as connection:
        floor = Floor(connection)
        sides = functions(pgqrs, floor)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(arguments.rounds + 1):
            for name, side in sides.items():
                clock = floor.begin()
                own = side(arguments.steps)
                rates[name].append((arguments.steps / clock.seconds, arguments.steps / own))
            if number == 0:  # caches, prepared statements, connections
                for measured in rates.values():
                    measured.clear()
                continue
            print(
                f"round {number}  " + "  ".join(f"{n} {m[-1][1]:.0f}/s of {m[-1][0]:.0f}/s" for n, m in rates.items())
            )
    print(f"\n{machine()}; {arguments.rounds} rounds of {arguments.steps} steps, in turns of {CHUNK}")
    for name, measured in rates.items():
        bare, own = zip(*measured, strict=True)
        ratios = [mine / theirs for theirs, mine in measured]
        print(f"{name:16} {spread(own):20} bare INSERT {spread(bare):20} ratio {spread(ratios, 2)}")
    pgqrs.ledger.database.close()


def compete(contestants: Sequence[Queued], arguments: argparse.Namespace) -> None:
    """Let the sides compete in turns, and print the table."""
    rates: dict[str, list[float]] = {contestant.title: [] for contestant in contestants}
    times: dict[str, list[float]] = {contestant.title: [] for contestant in contestants}
    for contestant in contestants:
        contestant.singles(3, arguments.steps)
        contestant.rest()
    total = arguments.workflows * arguments.steps
    for number in range(arguments.rounds):
        for contestant in contestants if number % 2 == 0 else contestants[::-1]:
            contestant.wake()
            contestant.singles(1, arguments.steps)
            rates[contestant.title].append(total / contestant.many(arguments.workflows, arguments.steps))
            singles = contestant.singles(arguments.singles, arguments.steps)
            times[contestant.title].append(1000 * statistics.median(singles))
            contestant.rest()
            print(
                f"round {number + 1}  {contestant.title:44} {rates[contestant.title][-1]:6.0f} steps/s "
                f"{times[contestant.title][-1]:7.1f} ms",
                flush=True,
            )
    for contestant in contestants:
        contestant.wake()
    first = rates[contestants[0].title]
    print(f"\n{machine()}; {arguments.rounds} rounds of {arguments.workflows} functions x {arguments.steps} steps")
    print(f"{'side':44}  {'steps/s':22} {'first side is faster by':24} p50 of a single one, ms")
    for title, own in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(first, own, strict=True)]
        print(f"{title:44}  {spread(own):22} {spread(ratios, 2):24} {spread(times[title], 1)}")


def queued(the_servers: Servers, arguments: argparse.Namespace) -> None:
    """Compare queued functions."""
    with ExitStack() as stack:
        sides: list[Queued] = []
        for name in arguments.sides:
            contestant = Contestant(the_servers, OURS[name](the_servers))
            stack.callback(contestant.stop)
            contestant.start_worker(f"steps-{name}").ready()
            sides.append(Own(contestant))
        if arguments.peers:
            python = environment(the_servers.directory / "peers", arguments.peers)
            for name in arguments.peers:
                for form in PEERS[name].forms:
                    peer = Peer(PEERS[name], form, python, the_servers.database(form.database))
                    sides.append(stack.enter_context(peer))
        compete(sides, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", action="store_true", help="queued functions instead of steps inside one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of a function (default: 1000, queued 10)")
    parser.add_argument("--workflows", type=int, default=200)
    parser.add_argument("--singles", type=int, default=20)
    parser.add_argument("--sides", nargs="+", choices=OURS, default=["postgres"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = 10 if arguments.queued else 1000
    with servers() as the_servers:
        (queued if arguments.queued else inside)(the_servers, arguments)


if __name__ == "__main__":
    main()
