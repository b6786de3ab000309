"""A Celery app with a ledger for tests that need no worker process: what it sends is read back from the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu import Connection
from psycopg import sql

from pgqrs_celery import Pgqrs
from pgqrs_celery.relay import Relay

#: A lease long enough for a busy machine, and everything else quick.
QUICK = {
    "pgqrs_lease": 20.0,
    "pgqrs_patience": 20.0,
    "pgqrs_resend_interval": 5.0,
    "pgqrs_relay_interval": 1.0,
    "broker_connection_retry_on_startup": True,
    "worker_prefetch_multiplier": 1,
    "worker_hijack_root_logger": False,
}


@dataclass(frozen=True, slots=True)
class Sent:
    """A message read back from the broker."""

    name: str
    id: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str
    args: Any
    kwargs: Any
    embed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepRow:
    """What the tests look at in a step's row."""

    step_id: str
    task_id: str
    task_name: str
    status: str
    open: bool
    generation: int
    attempt: int
    due: float | None
    sent: bool
    queue: str | None
    message: str | None
    output: str | None
    error: str | None
    root_id: str
    workflow_id: int


@dataclass(frozen=True, slots=True)
class RunRow:
    """What the tests look at in a run's row."""

    workflow_id: int
    root_id: str
    name: str
    status: str
    output: str | None
    error: str | None
    plan: str | None


class Shop:
    """An app, its ledger, and ways to look at both."""

    def __init__(self, broker: str, dsn: str, schema: str, *, backend: str | None = None, **conf: Any) -> None:
        self.app = Celery("shop", broker=broker, backend=backend, set_as_current=False)
        self.app.conf.update({**QUICK, "pgqrs_dsn": dsn, "pgqrs_schema": schema, **conf})
        self.pgqrs = Pgqrs(self.app)

    def task(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """A durable task of this app alone."""
        return self.pgqrs.task(function, shared=False, **options) if function else self._later(self.pgqrs.task, options)

    def plain(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """An ordinary task of this app alone."""
        return self.app.task(function, shared=False, **options) if function else self._later(self.app.task, options)

    @staticmethod
    def _later(make: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
        return lambda function: make(function, shared=False, **options)

    def close(self) -> None:
        """End all connections."""
        self.pgqrs.ledger.database.close()
        self.app.close()

    # --- the broker

    def messages(self, queue: str = "celery") -> list[Sent]:
        """Take everything out of a queue."""
        with Connection(self.app.conf.broker_url) as connection:
            channel = connection.default_channel
            found = []
            while (message := channel.basic_get(queue, no_ack=True)) is not None:
                message.accept = {"application/json", "application/x-python-serialize", "application/x-yaml"}
                args, kwargs, embed = message.decode() if message.headers else ((), {}, {})
                headers = dict(message.headers)
                found.append(
                    Sent(
                        name=headers.get("task", ""),
                        id=headers.get("id", ""),
                        headers=headers,
                        properties=dict(message.properties),
                        content_type=str(message.content_type),
                        args=args,
                        kwargs=kwargs,
                        embed=embed,
                    )
                )
        return found

    def message(self, queue: str = "celery") -> Sent:
        """The one message of a queue."""
        (message,) = self.messages(queue)
        return message

    @contextmanager
    def worker(self, **options: Any) -> Iterator[Any]:
        """A worker in a thread of this process, which executes tasks one after the other."""
        with start_worker(
            self.app, pool="solo", perform_ping_check=False, shutdown_timeout=60, loglevel="INFO", **options
        ) as worker:
            yield worker

    def relay(self) -> Relay:
        """A relay without a worker."""
        return Relay(self.app, self.pgqrs.ledger, self.pgqrs.publish, self.pgqrs.chords.revive)

    # --- the ledger

    def execute(self, statement: str, params: Any = ()) -> list[tuple[Any, ...]]:
        """Run SQL in which {schema} stands for the schema."""
        with self.pgqrs.ledger.database.session() as session:
            composed = sql.SQL(statement).format(schema=sql.Identifier(self.pgqrs.ledger.database.schema))
            cursor = session.connection.execute(composed, params)
            return cursor.fetchall() if cursor.description else []

    def steps(self) -> list[StepRow]:
        """All steps in the order they came."""
        found = self.execute(
            "SELECT s.step_id, s.task_id, s.task_name, s.status, s.open, s.generation, s.attempt, "
            "extract(epoch FROM s.due_at - {schema}.pgqrs_now())::float8, s.sent_at IS NOT NULL, s.queue, s.message, "
            "s.output, s.error, w.root_id, s.workflow_id FROM {schema}.pgqrs_workflow_steps s "
            "JOIN {schema}.pgqrs_workflows w USING (workflow_id) ORDER BY s.created_at, s.step_id"
        )
        return [StepRow(*row) for row in found]

    def step(self, task_id: str) -> StepRow:
        """One step."""
        return next(step for step in self.steps() if step.task_id == task_id)

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        found = self.execute(
            "SELECT workflow_id, root_id, name, status, output, error, plan FROM {schema}.pgqrs_workflows "
            "ORDER BY workflow_id"
        )
        return [RunRow(*row) for row in found]

    def make_due(self) -> None:
        """Let the time of everything that waits have come."""
        self.execute(
            "UPDATE {schema}.pgqrs_workflow_steps SET due_at = {schema}.pgqrs_now() - interval '1 s' "
            "WHERE due_at IS NOT NULL"
        )
