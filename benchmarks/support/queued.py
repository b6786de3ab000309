"""What competes in the benchmark of queued functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import psutil

from benchmarks.support.application import Side
from benchmarks.support.arena import Contestant, Servers

__all__ = ["OURS", "Own", "Queued"]


class Queued(Protocol):
    """An engine with two worker processes that executes functions of trivial steps."""

    title: str

    def many(self, workflows: int, steps: int) -> float:
        """Enqueue so many at once and return the seconds until the last result is back."""

    def singles(self, workflows: int, steps: int) -> list[float]:
        """Enqueue them one after the other, and return the seconds each has taken."""

    def rest(self) -> None:
        """Stop all its processes where they are: who polls would disturb whose turn it is."""

    def wake(self) -> None:
        """Let them go on."""


class Own:
    """This package, with its defaults."""

    def __init__(self, contestant: Contestant) -> None:
        self.title = contestant.side.title
        self._contestant = contestant
        self._function: Any = contestant.app.count_up  # type: ignore[attr-defined]

    def many(self, workflows: int, steps: int) -> float:
        """Start them all, then get every result."""
        began = time.perf_counter()
        runs = [self._function.delay(steps) for _ in range(workflows)]
        assert [run.get(timeout=300) for run in runs] == [steps] * workflows
        return time.perf_counter() - began

    def singles(self, workflows: int, steps: int) -> list[float]:
        """Start one, get its result, start the next."""
        return [self.many(1, steps) for _ in range(workflows)]

    def rest(self) -> None:
        """Stop the workers, pool processes included."""
        for process in self._processes():
            process.suspend()

    def wake(self) -> None:
        """Let them go on."""
        for process in self._processes():
            process.resume()

    def _processes(self) -> Iterator[psutil.Process]:
        for worker in self._contestant.workers:
            main = psutil.Process(worker.pid)
            yield main
            yield from main.children(recursive=True)


def on_postgres(servers: Servers) -> Side:
    """Messages, results and ledger in one database."""
    dsn = servers.database("functions")
    url = f"pgqrs+{dsn}"
    return Side("postgres", "pgqrs-celery, everything on Postgres", url, url, dsn)


def on_redis(servers: Servers) -> Side:
    """Messages in Redis; results and ledger in Postgres."""
    dsn = servers.database("functions_redis")
    return Side("redis", "pgqrs-celery, messages in Redis", servers.redis.database_url(5), f"pgqrs+{dsn}", dsn)


OURS: Final[dict[str, Callable[[Servers], Side]]] = {"postgres": on_postgres, "redis": on_redis}
