"""The broker: what a claim costs with a backlog, rates against Redis, what an idle worker costs, and what it leaves.

    python -m benchmarks.broker [--rounds 3] [--tasks 3000] [--soak MINUTES] [--only backlog rates latency idle]

Rates compare plain Celery tasks without results, on this broker and on Redis, in turns, with one worker of two pool
processes; processor time per task is what tells most on a machine that is not quiet. Postgres writes to disk before it
answers (fsync on), Redis does not.

Latency is that of one task from ``delay()`` to its result, both sides in turns, once with pauses in which the worker
comes to rest, and once with each task sent as soon as the last one's result is there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import psycopg
from celery import Celery

from benchmarks.support.application import Side
from benchmarks.support.arena import Contestant, Servers, servers
from benchmarks.support.measure import machine
from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from pgqrs_celery.store import messages, migrations
from pgqrs_celery.store.messages import NewMessage
from pgqrs_celery.transport.keeper import WIRE_SETTINGS

BODY: Final = b'[[1], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
HEADERS: Final = '{"lang": "py", "task": "increment", "id": "6af71d9c-c889-436a-9f25-f2103a4012f7"}'
CLAIMS: Final = 500
PARTS: Final = ("backlog", "rates", "latency", "idle")
#: Seconds between two tasks whose latency is measured: a worker is at rest some 6 ms after its last one.
PAUSES: Final = {"worker at rest": 0.03, "back to back": 0.0}
STATEMENT: Final = re.compile(r"LOG:  (?:statement|execute [^:]*): ")


def message(queue: str = "celery", **fields: Any) -> NewMessage:
    """Return a message like Celery's."""
    return NewMessage(messages.new_id(), "", queue, HEADERS, "{}", BODY, **fields)


def fill(session: Session, count: int, **fields: Any) -> None:
    """Publish many messages."""
    for start in range(0, count, 1000):
        messages.publish(session, [message(**fields) for _ in range(min(1000, count - start))])


@dataclass
class Place:
    """A broker of its own, with something waiting in it."""

    name: str
    session: Session
    taken: list[float] = field(default_factory=list)


def backlog(arena: Servers) -> None:
    """Claim and acknowledge one message at a time, in front of backlogs of different sizes, in turns."""
    print("\nA claim with its acknowledgement, one message:", CLAIMS, "of each, in turns")
    dsn = arena.database("backlog")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    with ExitStack() as stack:
        empty = place(stack, dsn, "nothing waits")
        some = place(stack, dsn, "10000 wait")
        fill(some.session, 10_000)
        many = place(stack, dsn, "100000 wait")
        fill(many.session, 100_000)
        leased = place(stack, dsn, "100000 wait, 200 of them leased")
        fill(leased.session, 100_000)
        for _ in range(2):
            messages.claim(leased.session, uuid4(), ["celery"], count=100, lease=600)
        deferred = place(stack, dsn, "100000 wait for an ETA")
        fill(deferred.session, 100_000, visible_at=tomorrow)
        places = [empty, some, many, leased, deferred]
        for _ in range(CLAIMS):
            for one in places:
                one.taken.append(timed_claim(one.session))
        for one in places:
            median, low = statistics.median(one.taken), statistics.quantiles(one.taken, n=10)[0]
            ratio, ratio_low = median / statistics.median(empty.taken), low / statistics.quantiles(empty.taken, n=10)[0]
            print(
                f"  {one.name:<34} median {median:5.0f} µs ({ratio:4.2f}x), tenth percentile {low:5.0f} µs "
                f"({ratio_low:4.2f}x), {buffers(one.session)} pages"
            )


def place(stack: ExitStack, dsn: str, name: str) -> Place:
    """Install a broker in a schema of its own and connect to it as a worker does."""
    database = Database(dsn, schema="s" + uuid4().hex[:8])
    migrations.install(database)
    stack.callback(database.close)
    session = stack.enter_context(database.session())
    for setting in WIRE_SETTINGS:
        session.connection.execute(setting.encode())
    return Place(name, session)


def timed_claim(session: Session) -> float:
    """Publish a message; return what a claim and an acknowledgement take, in microseconds."""
    messages.publish(session, [message()])
    began = time.perf_counter()
    (claimed,) = messages.claim(session, uuid4(), ["celery"], count=1, lease=30)
    messages.delete(session, [claimed.message_id])
    return (time.perf_counter() - began) * 1e6


def buffers(session: Session) -> int:
    """Return how many pages a claim looks at."""
    messages.publish(session, [message()])
    params = {
        "consumer_id": uuid4(),
        "queues": ["celery"],
        "count": 1,
        "lease": 30,
        "dead": [],
        "done": [],
        "awake": False,
    }
    text = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + session.text("messages.claim")
    row = session.connection.execute(text.encode(), params).fetchone()
    assert row
    (plan,) = json.loads(row[0])
    return int(plan["Plan"]["Shared Hit Blocks"]) + int(plan["Plan"]["Shared Read Blocks"])


def sides(arena: Servers, database: str) -> list[Side]:
    """Plain Celery on the two brokers."""
    url = arena.redis.database_url(PARTS.index(database))
    ours = f"pgqrs+{arena.database(database)}&pgqrs_auto_install=true"
    return [Side("redis", "Redis", url, url), Side("ours", "Postgres", ours, ours)]


def done(app: Celery) -> int:
    """How many tasks the workers have executed."""
    stats = app.control.inspect(timeout=0.3).stats() or {}
    return sum(int(worker["total"].get("increment", 0)) for worker in stats.values())


def send(app: Celery, count: int) -> float:
    """Send tasks one by one; return how many a second."""
    began = time.perf_counter()
    for number in range(count):
        app.send_task("increment", (number,), ignore_result=True)
    return count / (time.perf_counter() - began)


def rates(arena: Servers, rounds: int, tasks: int) -> None:
    """Send, and work off a prepared queue."""
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        contestants = [Contestant(arena, side, concurrency=2) for side in sides(arena, "rates")]
        for contestant in contestants:
            stack.callback(contestant.stop)
        for _ in range(rounds):
            for contestant in contestants:
                for name, value in measured(contestant, tasks).items():
                    figures[contestant.side.name][name].append(value)
    print(f"\nRates, {rounds} rounds of {tasks} tasks without results, median (lowest-highest)")
    for name in figures["ours"]:
        for side, found in figures.items():
            values = found[name]
            print(f"  {name:<38} {side:<6} {statistics.median(values):8.1f} ({min(values):.1f}-{max(values):.1f})")
        ratio = statistics.median(figures["ours"][name]) / statistics.median(figures["redis"][name])
        print(f"  {'':<38} ours/redis {ratio:4.2f}")


def measured(contestant: Contestant, tasks: int) -> dict[str, float]:
    """Return one round's figures of one side."""
    app = contestant.app
    sent = send(app, tasks)
    app.control.purge()
    worker = contestant.start_worker(f"w{uuid4().hex[:6]}")
    app.send_task("increment", (0,)).get(timeout=60)
    meter, began, before = contestant.meter(), time.perf_counter(), done(app)
    send(app, tasks)
    while done(app) < before + tasks:
        pass
    through = tasks / (time.perf_counter() - began)
    usage = meter.stop()
    worker.terminate()
    contestant.workers.pop().stop()
    return {
        "sent one by one, tasks/s": sent,
        "sent and executed, tasks/s": through,
        "processor, ms per task": sum(usage.parts.values()) * 1000 / tasks,
    }


def latency(arena: Servers, rounds: int) -> None:
    """One task's way there and back, with the worker at rest before it, and with no pause at all."""
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        contestants = [Contestant(arena, side, concurrency=2) for side in sides(arena, "latency")]
        for contestant in contestants:
            stack.callback(contestant.stop)
            contestant.start_worker(f"w{uuid4().hex[:6]}")
            contestant.app.send_task("increment", (0,)).get(timeout=60)
            round_trips(contestant.app, 20)
        for _ in range(10 * rounds):
            for contestant in contestants:
                for name, pause in PAUSES.items():
                    figures[name, contestant.side.name] += round_trips(contestant.app, 20, pause)[1:]
    for name in PAUSES:
        print(f"\nRound trip of a task with its result, {name}, ms: median (tenth-ninetieth percentile)")
        for side in ("redis", "ours"):
            deciles = statistics.quantiles(figures[name, side], n=10)
            print(f"  {side:<6} {deciles[4]:6.2f} ({deciles[0]:.2f}-{deciles[8]:.2f})")
        ratio = statistics.median(figures[name, "ours"]) / statistics.median(figures[name, "redis"])
        print(f"  ours/redis {ratio:4.2f}")


def round_trips(app: Celery, count: int, pause: float = 0.0) -> list[float]:
    """Send tasks, each when the last one's result is there and so many seconds (on average) have passed; in ms."""
    times = []
    for number in range(count):
        time.sleep(random.uniform(0.5 * pause, 1.5 * pause))
        began = time.perf_counter()
        assert app.send_task("increment", (number,)).get(timeout=10, interval=0.001) == number + 1
        times.append((time.perf_counter() - began) * 1000)
    return times


def idle(arena: Servers, seconds: float = 30.0) -> None:
    """Count the statements of a worker that has nothing to do."""
    dsn = arena.database("idle")
    migrations.install(Database(dsn))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("ALTER DATABASE idle SET log_statement = 'all'")
    contestant = Contestant(arena, Side("idle", "idle", f"pgqrs+{dsn}", f"pgqrs+{dsn}"), concurrency=2)
    try:
        contestant.start_worker("idle")
        contestant.app.send_task("increment", (0,)).get(timeout=30)
        before, began = logged(arena), time.monotonic()
        while time.monotonic() - began < seconds:
            time.sleep(0.5)
        rate = (logged(arena) - before) / (time.monotonic() - began)
    finally:
        contestant.stop()
    print(f"\nAn idle worker: {rate:.2f} statements per second, over {seconds:.0f} s")


def logged(arena: Servers) -> int:
    """How many statements the server has logged."""
    texts = [path.read_text(errors="replace") for path in arena.postgres.directory.glob("*.log")]
    return sum(len(STATEMENT.findall(text)) for text in texts)


def soak(arena: Servers, minutes: float) -> None:
    """Send and execute as fast as it goes, and watch the size of the tables."""
    dsn = arena.database("soak")
    url = f"pgqrs+{dsn}&pgqrs_auto_install=true"
    contestant = Contestant(arena, Side("soak", "soak", url, url), concurrency=2)
    print(f"\nA soak of {minutes:g} minutes, one sender, two pool processes")
    try:
        contestant.start_worker("soak")
        contestant.app.send_task("increment", (0,)).get(timeout=60)
        with psycopg.connect(dsn, autocommit=True) as connection:
            began, sent, step = time.monotonic(), 0, max(minutes * 60 / 10, 1)
            following = began + step
            while time.monotonic() - began < minutes * 60:
                if waiting(connection) < 2000:
                    send(contestant.app, 500)
                    sent += 500
                if time.monotonic() >= following:
                    following += step
                    print(f"  {time.monotonic() - began:5.0f} s  {sent:>8} sent  {bloat(connection)}")
    finally:
        contestant.stop()


def waiting(connection: psycopg.Connection[Any]) -> int:
    """How many messages there are."""
    row = connection.execute("SELECT count(*) FROM pgqrs_messages").fetchone()
    assert row
    return int(row[0])


def bloat(connection: psycopg.Connection[Any]) -> str:
    """Return sizes and kinds of updates of the tables a message passes through."""
    found = connection.execute(
        """
        SELECT pg_relation_size('pgqrs_messages') / 1024, pg_indexes_size('pgqrs_messages') / 1024,
               pg_total_relation_size('pgqrs_consumers') / 1024, n_live_tup, n_dead_tup, autovacuum_count,
               round(100.0 * n_tup_hot_upd / greatest(n_tup_upd, 1), 1)
          FROM pg_stat_user_tables WHERE relname = 'pgqrs_messages'"""
    ).fetchone()
    assert found
    table, indexes, consumers, live, dead, vacuums, hot = found
    return (
        f"messages {table} kB + indexes {indexes} kB, consumers {consumers} kB, {live} live, {dead} dead, "
        f"{vacuums} vacuums, {hot} % HOT"
    )


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    print(machine())
    with servers() as arena:
        if options.soak:
            soak(arena, options.soak)
            return
        if "backlog" in options.only:
            backlog(arena)
        if "rates" in options.only:
            rates(arena, options.rounds, options.tasks)
        if "latency" in options.only:
            latency(arena, options.rounds)
        if "idle" in options.only:
            idle(arena)


if __name__ == "__main__":
    main()
