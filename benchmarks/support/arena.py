"""The servers, and the sides that compete on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import psycopg
from celery import Celery

from benchmarks.support.application import PROFILE, Side, make_app
from benchmarks.support.measure import Meter
from examples.support import JOURNAL, Journal, Worker, wait_for
from pgqrs_celery import embedded

__all__ = ["SIDES", "Contestant", "Servers", "servers"]


@dataclass(frozen=True, slots=True)
class Servers:
    """One Postgres (with fsync), one Redis (in memory), a directory and a journal."""

    postgres: embedded.PostgresServer
    redis: embedded.RedisServer
    directory: Path
    journal: Journal

    def database(self, name: str) -> str:
        """Create a database and return its DSN."""
        with psycopg.connect(self.postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.postgres.dsn(name)


def plain(servers: Servers) -> Side:
    """Celery as it is."""
    url = servers.redis.database_url(1)
    return Side("plain", "plain Celery, Redis + Redis", url, url)


def durable(servers: Servers) -> Side:
    """Durable tasks, everything else as before."""
    url = servers.redis.database_url(2)
    return Side("durable", "durable, Redis + Redis", url, url, servers.database("durable"))


def durable_pg(servers: Servers) -> Side:
    """Durable tasks whose results are in the ledger's Postgres as well."""
    dsn = servers.database("durable_pg")
    url = servers.redis.database_url(3)
    return Side("durable-pg", "durable, Redis + pgqrs+postgresql", url, f"pgqrs+{dsn}", dsn)


def one_postgres(servers: Servers) -> Side:
    """Durable tasks, with broker, results and ledger in one database."""
    dsn = servers.database("one_postgres")
    return Side("one-postgres", "durable, everything on one Postgres", f"pgqrs+{dsn}", f"pgqrs+{dsn}", dsn)


def one_postgres_async(servers: Servers) -> Side:
    """The same, with commits that do not wait for the disk."""
    dsn = servers.database("one_postgres_async")
    url = f"pgqrs+{dsn}"
    return Side("one-async", "the same, pgqrs_synchronous_commit = False", url, url, dsn, synchronous_commit="")


def one_postgres_queued(servers: Servers) -> Side:
    """The same (on disk before anybody acts on it), with every link through the queue."""
    dsn = servers.database("one_postgres_queued")
    url = f"pgqrs+{dsn}"
    return Side("one-queued", "the same, pgqrs_local_continuation = 0", url, url, dsn, local_continuation="0")


def official(servers: Servers) -> Side:
    """Celery's own Postgres pair, as its documentation has it."""
    name, socket = "official", str(servers.postgres.socket_directory)
    servers.database(name)
    # Without the extension, which a Postgres from a wheel does not have.
    install = import_module("pgmq").install_pgmq_from_sql
    install(host=socket, port="5432", username="postgres", password="", database=name)
    broker = f"pgmq://postgres@{quote(socket, safe='')}:5432/{name}"
    return Side(
        name, "plain Celery, pgmq + db+postgresql", broker, f"db+postgresql+psycopg://postgres@/{name}?host={socket}"
    )


SIDES: Final[dict[str, Callable[[Servers], Side]]] = {
    "plain": plain,
    "durable": durable,
    "durable-pg": durable_pg,
    "one-postgres": one_postgres,
    "one-async": one_postgres_async,
    "one-queued": one_postgres_queued,
    "official": official,
}


@contextmanager
def servers() -> Iterator[Servers]:
    """Start the servers, in a directory that vanishes afterwards."""
    directory = embedded.new_directory("pgqrs-bench-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        postgres = embedded.postgres(directory / "postgres", settings={"max_connections": "200"})
        stack.callback(postgres.stop)
        redis = stack.enter_context(embedded.redis_server())
        journal = Journal(directory / "journal")
        os.environ[JOURNAL] = str(journal.path)
        yield Servers(postgres, redis, directory, journal)


class Contestant:
    """One side: its app in this process, and its workers."""

    def __init__(
        self, servers: Servers, side: Side, *, concurrency: int = 2, profile: bool = False, events: bool = False
    ) -> None:
        self.servers = servers
        self.side = side
        self.app: Celery = make_app(side)
        self._ledger: Any = getattr(self.app, "pgqrs", None)
        self._concurrency = concurrency
        self._options = ("--without-heartbeat", "-E") if events else ("--without-heartbeat",)
        self._profile = servers.directory / f"profile-{side.name}" if profile else None
        self.workers: list[Worker] = []
        if self._ledger is not None:
            self._ledger.install()

    @property
    def profiles(self) -> Sequence[Path]:
        """What the processes of the pool have left, once they have ended."""
        return sorted(self._profile.glob("*.prof")) if self._profile else []

    @property
    def watch_interval(self) -> float:
        """Seconds between two looks of this side's workers at each other."""
        return float(self._ledger.settings.watch_interval)

    def start_worker(self, name: str) -> Worker:
        """Start one worker; ``ready`` waits for it."""
        environment = self.side.environment()
        if self._profile:
            self._profile.mkdir(exist_ok=True)
            environment[PROFILE] = str(self._profile)
        worker = Worker(
            self.app, name=name, concurrency=self._concurrency, options=self._options, environment=environment
        )
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """Stop the workers and close the connections."""
        for worker in self.workers:
            worker.terminate()
        while self.workers:
            self.workers.pop().stop()
        if self._ledger is not None:
            self._ledger.ledger.database.close()
        self.app.close()

    def meter(self) -> Meter:
        """Start measuring the processor time of this side's processes and of both servers."""
        postgres, redis = self.servers.postgres.postmaster_pid, self.servers.redis.pid
        assert postgres is not None
        assert redis is not None
        return Meter(self.workers[0].pid, {"postgres": postgres, "redis": redis})

    def check(self, runs: int) -> str:
        """Return what the ledger says about all runs so far; raises ``AssertionError`` where something is missing."""
        if self._ledger is None:
            return ""
        statement = f"""
            SELECT count(*) FILTER (WHERE status = 'SUCCESS'),
                   (SELECT count(*) FROM {self.side.schema}.pgqrs_workflow_steps WHERE status = 'SUCCESS'),
                   (SELECT count(*) FROM {self.side.schema}.pgqrs_workflow_steps WHERE attempt > 1)
              FROM {self.side.schema}.pgqrs_workflows"""
        with psycopg.connect(self.side.dsn, autocommit=True) as connection:

            def counts() -> tuple[int, ...] | None:
                row = connection.execute(statement.encode()).fetchone()
                return row if row and row[0] >= runs else None

            succeeded, steps, repeated = wait_for(counts, f"{runs} runs to be closed")
        assert succeeded == runs, f"{succeeded} runs are SUCCESS, {runs} were started"
        return f"{self.side.name}: {succeeded} runs and {steps} steps are SUCCESS, {repeated} executed more than once"
