"""A shop with a worker in a thread of this process, and a journal of what its tasks did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from pgqrs_celery.envelope import SENT, Envelope
from pgqrs_celery.store import runs
from pgqrs_celery.workflow import WorkflowRun
from tests.support.shop import Shop
from tests.support.waiting import wait_for

TIMEOUT = 30


class Bench:
    """A shop with a worker, and a journal of what its tasks did."""

    worker: Any = None

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.journal: Counter[str] = Counter()
        self.broken: set[str] = set()
        self._define()

    def note(self, line: str) -> None:
        self.journal[line] += 1

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """A further durable task, which the running worker learns of."""

        def make(function: Callable[..., Any]) -> Any:
            self.shop.app.tasks.pop(options["name"], None)
            task = self.shop.task(function, **options)
            assert task.name in self.shop.app.tasks
            self.worker.consumer.update_strategies()
            return task

        return make

    def call_relay(self) -> None:
        """Let the worker's relay look at once."""
        ledger = self.shop.pgqrs.ledger
        ledger.call(lambda session: runs.notify(session, ledger.channel))

    def send_again(self, task_id: str) -> None:
        """Send the stored message of a step once more, as a broker may."""
        (message,) = [step.message for step in self.shop.steps() if step.task_id == task_id]
        envelope = Envelope.load(message or "", {"application/json"})
        with self.shop.app.connection_for_write() as connection:
            connection.Producer().publish(
                envelope.body,
                headers={**envelope.headers, SENT: "2030-01-01T00:00:00+00:00"},
                routing_key="celery",
                serializer="json",
                **envelope.properties,
            )

    def run_of(self, result: Any) -> WorkflowRun:
        run = self.shop.pgqrs.run_of(result)
        assert run is not None
        return run

    def ended(self, run: WorkflowRun) -> str:
        """Wait for a run's end; returns its status."""
        wait_for(lambda: run.status in ("SUCCESS", "FAILED", "CANCELLED"), TIMEOUT, f"the end of {run}")
        return str(run.status)

    def rows(self, run: WorkflowRun) -> dict[str, str]:
        """The statuses of a run's steps, by task name."""
        return {step.task_name.removeprefix("shop."): step.status for step in run.steps()}

    def _define(self) -> None:
        task, bench = self.shop.task, self

        @task(name="shop.add")
        def add(x: int, y: int = 0) -> int:
            bench.note(f"add {x} {y}")
            return x + y

        @task(name="shop.echo")
        def echo(value: Any = None, *rest: Any, **more: Any) -> Any:
            bench.note(f"echo {value}")
            return value

        @task(name="shop.total")
        def total(values: list[int]) -> int:
            bench.note(f"total {values}")
            return sum(values)

        @task(name="shop.fails")
        def fails(*args: Any) -> None:
            bench.note("fails")
            raise ValueError("no such luck")

        @task(name="shop.note")
        def note(value: Any) -> str:
            bench.note(f"note {value}")
            return "noted"

        @self.shop.plain(name="shop.plain")
        def plain(value: Any = None) -> Any:
            bench.note(f"plain {value}")
            return value

        @self.shop.plain(name="shop.plain_errback")
        def plain_errback(request: Any, exc: Any, traceback: Any) -> None:
            bench.note(f"plain errback {type(exc).__name__}")

        self.add, self.echo, self.total, self.fails, self.note_task = add, echo, total, fails, note
        self.plain, self.plain_errback = plain, plain_errback
