"""A few workers that are always ready: tests kill them, and the next test finds replacements."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from celery.result import AsyncResult
from kombu import Connection

from pgqrs_celery import WorkflowRun
from pgqrs_celery.states import TERMINAL
from pgqrs_celery.store import runs, steps
from tests.support.scenario import Application, Scenario
from tests.support.waiting import PATIENCE, wait_for
from tests.support.worker_process import WorkerProcess

__all__ = ["Fleet", "Victim"]

Victim = Literal["child", "worker"]


@dataclass(slots=True)
class Fleet:
    """Workers of one scenario, and the client side of it."""

    scenario: Scenario
    size: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    application: Application = field(init=False)
    workers: list[WorkerProcess] = field(default_factory=list)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    #: How often a task is to have had its effect of a kind.
    _expected: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.application = Application(self.scenario)
        self.application.pgqrs.install()
        if self.scenario.on_one_postgres:
            self.scenario.stops.install()

    def __enter__(self) -> Self:
        self.fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.audit()
        finally:
            for worker in self.workers:
                worker.close()

    @property
    def tasks(self) -> Any:
        """The vocabulary."""
        return self.application.tasks

    def fill(self) -> None:
        """Replace dead workers and wait until all are ready."""
        self._replace()
        for worker in self.workers:
            worker.wait_ready()

    def _replace(self) -> None:
        self.workers = [worker for worker in self.workers if worker.alive]
        while len(self.workers) < self.size:
            worker = WorkerProcess(self.scenario, f"{self.scenario.name}-{next(self._numbers)}", **self.options)
            worker.start()
            self.workers.append(worker)

    def owner(self, pid: int) -> WorkerProcess:
        """Return the worker a process belongs to."""
        for worker in self.workers:
            if worker.has(pid):
                return worker
        raise AssertionError(f"no worker has a process {pid}")

    def kill(self, victim: Victim, pid: int) -> None:
        """Kill a pool process, or all processes of the worker it belongs to."""
        worker = self.owner(pid)
        if victim == "child":
            worker.kill_child(pid)
        else:
            worker.kill()
        self._replace()

    @contextmanager
    def holding(self, *links: Any) -> Iterator[None]:
        """Let nobody begin these until the block ends: whoever is killed in it has none of them in its body."""
        with ExitStack() as held:
            for link in links:
                held.enter_context(self.scenario.points.arm("delivered_before_acquire", link.id))
            yield

    def run_of(self, result: AsyncResult[Any] | str) -> WorkflowRun:
        """Return the run of a result."""
        run = self.application.pgqrs.run_of(result)
        assert run is not None, f"{result} belongs to no run"
        return run

    def root_of(self, task_id: str) -> str:
        """Return the root of the run a task belongs to."""
        ledger = self.application.pgqrs.ledger
        step = ledger.call(lambda session: steps.peek(session, task_id))
        assert step is not None, f"task {task_id} has no step"
        found = ledger.call(lambda session: runs.find(session, workflow_id=step.workflow_id))
        assert found is not None
        return found.root_id

    def ended(self, result: AsyncResult[Any] | str) -> WorkflowRun:
        """Wait until the run of a result has ended and return it."""
        run = self.run_of(result)
        self.wait_for(run, lambda: run.status in TERMINAL, "end")
        return run

    def wait_for(self, run: WorkflowRun, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is true of a run; if it is not in the end, say how the run stands."""
        try:
            wait_for(condition, PATIENCE, f"run {run.id} to {what}")
        except AssertionError as error:
            steps_now = "".join(f"\n  {step}" for step in run.steps())
            raise AssertionError(
                f"{error}; it is {run.status}, its steps are:{steps_now}\n{self.last_words()}"
            ) from None

    def last_words(self) -> str:
        """Return the end of what each worker has logged."""
        return "\n".join(f"-- {worker.name}:\n{worker.output()[-3000:]}" for worker in self.workers)

    def expect(self, counts: Mapping[str, int], kind: str = "body") -> None:
        """Check how often tasks had their effect, by task id; and that it stays so, when the fleet ends."""
        log = self.scenario.log
        found = {task_id: log.count(task_id, kind) for task_id in counts}
        effects = [effect for effect in log.read() if found.get(effect.task_id, 0) != counts.get(effect.task_id, 0)]
        if found != dict(counts):
            wrong = {task_id: (count, counts[task_id]) for task_id, count in found.items() if count != counts[task_id]}
            raise AssertionError(f"found and expected: {wrong}; noted: {effects}\n{self.last_words()}")
        self._expected |= {(task_id, kind): count for task_id, count in counts.items()}

    def audit(self) -> None:
        """Let everything that is still on its way arrive, stop warmly, and count once more."""
        self.fill()
        wait_for(lambda: self.waiting() == 0, PATIENCE, "the queue to be empty")
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        assert [worker.wait_exit() for worker in self.workers] == [0] * len(self.workers)
        log = self.scenario.log
        later = {
            (task_id, kind): (count, log.count(task_id, kind))
            for (task_id, kind), count in self._expected.items()
            if log.count(task_id, kind) != count
        }
        assert not later, f"(counted in its test, counted at the end) by task id and kind: {later}"

    def logged(self, text: str) -> bool:
        """Return whether one of the present workers has logged this."""
        return self.occurrences(text) > 0

    def occurrences(self, text: str) -> int:
        """Return how often the present workers have logged this."""
        return sum(worker.output().count(text) for worker in self.workers)

    def holds(self, task_id: str) -> bool:
        """Return whether a worker has a task in its memory: running, reserved or waiting for its time."""
        names = [worker.hostname for worker in self.workers]
        inspect = self.application.celery.control.inspect(names, timeout=PATIENCE, limit=len(names))
        answers = [inspect.active(), inspect.reserved(), inspect.scheduled()]
        assert all(answer is not None and len(answer) == len(self.workers) for answer in answers), answers
        return task_id in json.dumps(answers)

    # The broker

    @property
    def broker(self) -> str:
        """Which one it is: postgres, redis or rabbitmq."""
        if self.scenario.broker.startswith("pgqrs"):
            return "postgres"
        return "redis" if self.scenario.broker.startswith("redis") else "rabbitmq"

    @property
    def queue(self) -> str:
        """The queue everything goes through."""
        return str(self.application.celery.conf.task_default_queue)

    def connection(self) -> Connection:
        """Return a connection of its own to the broker."""
        return self.application.celery.connection_for_write()  # type: ignore[no-any-return]

    def waiting(self) -> int:
        """Return how many messages wait in the queue."""
        with self.connection() as connection:
            try:
                return int(connection.default_channel.queue_declare(self.queue, passive=True).message_count)
            except connection.channel_errors:  # Redis has no empty queues
                return 0

    def lose_messages(self) -> int:
        """Empty the queue, as a broker without its data would have it; returns how many messages that were."""
        with self.connection() as connection:
            try:
                return int(connection.default_channel.queue_purge(self.queue))
            except connection.channel_errors:
                return 0

    def deliver_again(self) -> None:
        """Let Redis give out now what dead workers have not acknowledged, without waiting for its visibility timeout.

        RabbitMQ does so by itself, as soon as their connection is gone; Postgres when their death has been noticed.
        """
        with self.connection() as connection:
            channel = connection.default_channel
            unacknowledged = getattr(channel, "unacked_key", None)
            if unacknowledged is None:
                return
            for tag in channel.client.hkeys(unacknowledged):
                channel.qos.restore_by_tag(tag.decode(), channel.client)
