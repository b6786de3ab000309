"""A ledger without Celery: one schema, several connections, and one clock that tests move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from pgqrs_celery.db import Database
from pgqrs_celery.session import Session
from pgqrs_celery.store import clock, leases, recording, runs, steps
from pgqrs_celery.store.clock import DueStep
from pgqrs_celery.store.recording import Finished, NewStep
from pgqrs_celery.store.runs import NewRun
from pgqrs_celery.store.steps import Acquired, BrokenHandOff
from tests.support.waiting import wait_for

Value = TypeVar("Value")

LEASE = 30.0
INTERVAL = 10.0
INTERVAL_MAX = 600.0
MAX_LOST = 3
POISON = '{"exc_type": "PoisonedStep"}'
ERROR = '{"exc_type": "ValueError"}'
MESSAGE = '{"name": "shop.pack"}'

ROW = (
    "task_id, status, open, generation, attempt, lost, handoffs, looks, fence, lease_token, worker_id, "
    "extract(epoch FROM due_at - {schema}.pgqrs_now())::float8, message, sent_at IS NOT NULL, output, error"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a step's row says, as far as the protocol is concerned; ``due`` is in seconds from now."""

    status: str
    open: bool
    generation: int
    attempt: int
    lost: int
    handoffs: int
    looks: int
    fence: int
    lease_token: UUID | None
    worker_id: UUID | None
    due: float | None
    message: str | None
    sent: bool
    output: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Worker:
    """Somebody who acquires steps."""

    worker_id: UUID = field(default_factory=uuid4)


class Ledger:
    """The statements of ``store/`` with the parameters most tests do not care about."""

    def __init__(self, database: Database, app: str = "shop") -> None:
        self.database = database
        self.app = app
        self.now: datetime | None = None
        self._connections: list[psycopg.Connection[Any]] = []
        self._threads = ThreadPoolExecutor(8)
        self._numbers = itertools.count()
        self.session = self.connect()

    # --- connections and the clock

    def connect(self) -> Session:
        """Another connection, on the same clock."""
        connection = self.database.connect()
        self._connections.append(connection)
        self._set_clock(connection)
        return Session(connection, self.database.texts)

    def close(self) -> None:
        """End whatever still waits, and every connection."""
        for connection in self._connections:
            if not connection.closed:
                connection.cancel()
        self._threads.shutdown()
        for connection in self._connections:
            connection.close()

    def _set_clock(self, connection: psycopg.Connection[Any]) -> None:
        value = "" if self.now is None else self.now.isoformat()
        connection.execute("SELECT set_config('pgqrs.now', %s, false)", [value])

    def stop_clock(self) -> datetime:
        """From now on it is always the same moment."""
        return self.set_clock(datetime(2030, 1, 1, tzinfo=UTC))

    def set_clock(self, now: datetime) -> datetime:
        self.now = now
        for connection in self._connections:
            self._set_clock(connection)
        return now

    def advance(self, seconds: float) -> None:
        """Let time pass on every connection."""
        assert self.now is not None, "stop the clock first"
        self.set_clock(self.now + timedelta(seconds=seconds))

    def in_thread(self, work: Callable[[], Value]) -> Future[Value]:
        """Run something that will wait for a lock."""
        return self._threads.submit(work)

    # --- raw looks

    def execute(self, statement: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run SQL in which {schema} stands for the schema."""
        composed = sql.SQL(statement).format(schema=sql.Identifier(self.database.schema))
        cursor = self.session.connection.execute(composed, params)
        return cursor.fetchall() if cursor.description else []

    def row(self, task_id: str) -> Row:
        """One step's row."""
        found = self.execute(f"SELECT {ROW} FROM {{schema}}.pgqrs_workflow_steps WHERE task_id = %s", [task_id])
        assert found, f"no step {task_id}"
        return Row(*found[0][1:])

    def rows(self, workflow_id: int) -> dict[str, Row]:
        """The rows of a run's steps, by task id."""
        found = self.execute(f"SELECT {ROW} FROM {{schema}}.pgqrs_workflow_steps WHERE workflow_id = %s", [workflow_id])
        return {row[0]: Row(*row[1:]) for row in found}

    def run_status(self, workflow_id: int) -> str:
        """One run's status."""
        found = self.execute("SELECT status FROM {schema}.pgqrs_workflows WHERE workflow_id = %s", [workflow_id])
        return str(found[0][0])

    # --- the protocol

    def step(self, task_id: str, **given: Any) -> NewStep:
        """A step to be recorded."""
        values: dict[str, Any] = {
            "step_id": task_id,
            "task_name": "shop.pack",
            "generation": 0,
            "message": MESSAGE,
            "queue": "celery",
            "delay": INTERVAL,
            "sent": True,
        }
        return NewStep(task_id=task_id, **{**values, **given})

    def unique(self, prefix: str = "t") -> str:
        """A task id nobody else has."""
        return f"{prefix}{next(self._numbers)}"

    def start(self, *task_ids: str, session: Session | None = None, **given: Any) -> int:
        """A run with these steps queued and sent."""
        new = [self.step(task_id) for task_id in task_ids]
        run = NewRun(**{"app": self.app, "root_id": task_ids[0], "name": "pack", **given})
        started = runs.start(session or self.session, run, new)
        assert started is not None
        return started[0]

    def record(
        self,
        workflow_id: int,
        step: NewStep | str,
        *,
        lease_token: UUID | None = None,
        finished: Finished | None = None,
        session: Session | None = None,
    ) -> str:
        """Record one step into a run; returns the outcome."""
        if isinstance(step, str):
            step = self.step(step)
        recorded = recording.record(
            session or self.session,
            [step],
            workflow_id=workflow_id,
            app=self.app,
            lease_token=lease_token,
            finished=finished,
        )
        assert [r.task_id for r in recorded] == [step.task_id]
        return str(recorded[0].outcome)

    def ask(
        self,
        task_id: str,
        *,
        generation: int = 0,
        token: UUID | None = None,
        worker: Worker | None = None,
        may_judge: bool = True,
        lease: float = LEASE,
        max_lost: int = MAX_LOST,
        session: Session | None = None,
    ) -> Acquired:
        """Ask for a step; the row must exist."""
        found = steps.acquire(
            session or self.session,
            task_id,
            generation=generation,
            lease_token=token or uuid4(),
            worker_id=worker.worker_id if worker else None,
            lease=lease,
            max_lost=max_lost,
            poison=POISON,
            may_judge=may_judge,
        )
        assert found is not None
        return found

    def acquire(self, task_id: str, worker: Worker | None = None, *, generation: int = 0) -> UUID:
        """Take a step, which must be free; returns the token."""
        token = uuid4()
        assert self.ask(task_id, token=token, worker=worker, generation=generation).verdict == "EXECUTE"
        return token

    def succeed(self, task_id: str, token: UUID, output: str = "1", session: Session | None = None) -> bool:
        """Write the owner's success."""
        return steps.succeed(session or self.session, task_id, lease_token=token, output=output)

    def fail(self, task_id: str, token: UUID, error: str = ERROR, session: Session | None = None) -> bool:
        """Write the owner's final error."""
        fence = steps.fail(session or self.session, task_id, error=error, lease=LEASE, lease_token=token)
        return fence is not None

    def hand_off(self, task_id: str, session: Session | None = None) -> int | None:
        """End the hand-off of what was executed last."""
        return steps.hand_off(session or self.session, task_id, fence=self.row(task_id).fence)

    def break_hand_off(self, task_id: str, interval: float = INTERVAL) -> BrokenHandOff | None:
        """Note that what follows from what was executed last could not be sent."""
        fence = self.row(task_id).fence
        return steps.hand_off_failed(self.session, task_id, fence=fence, error=ERROR, interval=interval)

    def give_up_hand_off(self, task_id: str) -> int | None:
        """Note that what follows from what was executed last never can be sent."""
        return steps.give_up_hand_off(self.session, task_id, fence=self.row(task_id).fence)

    def finish(self, task_id: str, output: str = "1") -> None:
        """Execute one queued step from beginning to end."""
        workflow_id = self.succeed_and_hand_off(task_id, output)
        runs.close_if_quiet(self.session, workflow_id)

    def succeed_and_hand_off(self, task_id: str, output: str = "1") -> int:
        """Execute one queued step, but do not look whether its run is quiet; returns the run."""
        assert self.succeed(task_id, self.acquire(task_id), output)
        workflow_id = self.hand_off(task_id)
        assert workflow_id is not None
        return workflow_id

    def fail_and_hand_off(self, task_id: str) -> int:
        """Let one queued step fail for good, without the look; returns its run."""
        assert self.fail(task_id, self.acquire(task_id))
        workflow_id = self.hand_off(task_id)
        assert workflow_id is not None
        return workflow_id

    def park(self, task_id: str, workflow_id: int, session: Session | None = None) -> bool:
        """Park a step of a paused run."""
        session = session or self.session
        with session.connection.transaction():
            return runs.park(session, workflow_id, task_id)

    def claim(
        self,
        *,
        may_judge: bool = True,
        batch: int = 100,
        interval: float = INTERVAL,
        max_lost: int = MAX_LOST,
        back: float | None = None,
        session: Session | None = None,
        app: str | None = None,
    ) -> list[DueStep]:
        """What the relay finds due."""
        return clock.claim_due(
            session or self.session,
            app=app or self.app,
            may_judge=may_judge,
            batch=batch,
            max_lost=max_lost,
            poison=POISON,
            interval=interval,
            interval_max=INTERVAL_MAX,
            back=back,
        )

    def expire(self, worker: Worker, max_lost: int = MAX_LOST) -> int:
        """Declare a worker dead; returns how many steps that concerns."""
        return leases.expire(self.session, app=self.app, worker_id=worker.worker_id, max_lost=max_lost, poison=POISON)

    def close_if_quiet(self, workflow_id: int, session: Session | None = None) -> str | None:
        """Look whether a run is quiet, and close it."""
        return runs.close_if_quiet(session or self.session, workflow_id)


def wait_until_blocked(look: Session, waiter: Session, by: Session, future: Future[Any]) -> None:
    """Wait until the server says, on a third connection, that one waits for a lock that another one has."""
    pids = [waiter.connection.info.backend_pid]

    def blocked() -> bool:
        if future.done():
            raise AssertionError(f"the statement did not wait: {future.result()}")
        row = look.connection.execute("SELECT pg_blocking_pids(%s)", pids).fetchone()
        return row is not None and by.connection.info.backend_pid in row[0]

    wait_for(blocked, 30, "a statement to be blocked")
