"""The context of a workflow function: its steps, its waits, its children.

One class serves both colours. In a plain function its methods return values; in an ``async def`` function they return
awaitables, and whatever touches the database runs in a thread. Step ids are given when a method is *called*, so
``asyncio.gather(fetch(ctx, 1), fetch(ctx, 2))`` names its calls in program order.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

import psycopg

from pgqrs_celery import ids, lending
from pgqrs_celery.calls import AcquiredStep, Attempt, Call, InnerGuard
from pgqrs_celery.exceptions import StepMisused
from pgqrs_celery.host import Host
from pgqrs_celery.journal import Journal, current_step
from pgqrs_celery.saga import Saga
from pgqrs_celery.states import Status
from pgqrs_celery.store.inner import Inner
from pgqrs_celery.waits import Pending, Waiting, results_of, sleeping, waiting_for_event

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as OrmSession

__all__ = ["Context", "RunId"]


class RunId(int):
    """A run's id: a number, and callable for those who write ``ctx.id()``."""

    def __call__(self) -> int:
        """Return the id."""
        return int(self)


class Context:
    """What a workflow function gets as its first argument."""

    def __init__(self, workflow_id: int, name: str, host: Host, *, is_async: bool) -> None:
        #: The run's id; ``ctx.id`` and ``ctx.id()`` are the same.
        self.id: Final = RunId(workflow_id)
        #: The run's name.
        self.name: Final = name
        #: Whether methods return awaitables.
        self.is_async: Final = is_async
        self._host = host
        self._opened: Journal | None = None
        self._opening = threading.Lock()
        self._acquired: set[str] = set()
        self._saga = Saga()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of run {self.id} ({self.name})>"

    @property
    def journal(self) -> Journal:
        """What is recorded of this execution; opened at the first use."""
        if self._opened is not None:
            return self._opened
        with self._opening:
            if self._opened is None:
                self._opened = self._host.open()
            return self._opened

    # Steps

    def step(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function once in this run: its result is recorded, and returned without a call on a replay.

        The function does not get the context; a ``@step`` does.
        """
        return self.perform(Call(name, function, args, kwargs))

    def perform(self, call: Call) -> Any:
        """Execute a step, or return what is recorded of it."""
        journal = self.journal
        attempt = Attempt(journal, call, journal.name(call.name))
        return self._perform_async(attempt) if self.is_async else self._perform(attempt)

    def _perform(self, attempt: Attempt) -> Any:
        call = attempt.call
        found = attempt.recall()
        if found is not None:
            return self._recalled(call, found)
        attempt.prepare()
        try:
            with attempt:
                value = call.function(*call.args, **call.kwargs)
                if isinstance(value, CoroutineType):
                    value.close()
                    raise StepMisused(f"step {call.name!r} is async def: its workflow must be async def, too")
            value = attempt.succeed(value)
        except BaseException as error:  # noqa: BLE001 - recorded, then raised again
            value = attempt.fail(error)
        finally:
            attempt.end()
        self._saga.note(attempt.step_id, call.compensate, value)
        return value

    async def _perform_async(self, attempt: Attempt) -> Any:
        call = attempt.call
        found = attempt.recall()
        if found is not None:
            return self._recalled(call, found)
        if attempt.is_ready:
            attempt.prepare()
        else:
            await self._in_thread(attempt.prepare)
        try:
            with attempt:
                if inspect.iscoroutinefunction(call.function):
                    value = await call.function(*call.args, **call.kwargs)
                else:
                    value = await self._in_thread(call.function, *call.args, **call.kwargs)
                    if inspect.isawaitable(value):
                        value = await value
            value = await self._in_thread(attempt.succeed, value)
        except BaseException as error:  # noqa: BLE001 - recorded, then raised again
            value = await self._in_thread(attempt.fail, error)
        finally:
            attempt.end()  # in the loop: between this and the step's end there is nothing
        self._saga.note(attempt.step_id, call.compensate, value)
        return value

    def _recalled(self, call: Call, found: Inner) -> Any:
        value = self.journal.value(found)
        self._saga.note(found.step_id, call.compensate, value, undone=found.status == Status.CANCELLED)
        return value

    def acquire_step(self, name: str) -> Any:
        """Ask for a step under exactly this name; returns an ``AcquiredStep``.

        The low level: no occurrence numbers, and an error recorded before does not come back; the step is to be
        executed again.
        """
        journal = self.journal
        step_id = journal.path(name)

        def ask() -> AcquiredStep:
            found = journal.take(step_id)
            if found is None and step_id in self._acquired:
                found = journal.find(step_id)
            self._acquired.add(step_id)
            if found is not None and found.task_id is None and found.status == Status.SUCCESS:
                return AcquiredStep("SKIPPED", journal.value(found))
            journal.confirm()
            return AcquiredStep("EXECUTE", None, InnerGuard(journal, step_id, self._call))

        return self._call(ask)

    @property
    def step_id(self) -> str | None:
        """The id of the step being executed; ``f"{ctx.id}-{ctx.step_id}"`` makes outside effects idempotent."""
        return current_step()

    def patched(self, name: str) -> Any:
        """Return whether this run takes the new way through code that was changed.

        True for runs that had not come this far when the change was deployed, and from then on always; False for
        those that have something recorded beyond this point.
        """
        journal = self.journal
        step_id = journal.path(f"patched {name}")

        def ask() -> bool:
            if journal.recall(step_id) is None and step_id not in self._acquired:
                if journal.is_replaying:
                    return False
                journal.succeed(step_id, True)
            self._acquired.add(step_id)
            return True

        return self._call(ask)

    # Waits

    def sleep(
        self,
        name: str | float | timedelta = "sleep",
        /,
        *,
        seconds: float = 0.0,
        minutes: float = 0.0,
        hours: float = 0.0,
        days: float = 0.0,
    ) -> Any:
        """Sleep; no worker slot is held meanwhile. ``ctx.sleep(30)``, or ``ctx.sleep("cool-off", hours=1)``."""
        length = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if not isinstance(name, str):
            length += name if isinstance(name, timedelta) else timedelta(seconds=name)
            name = "sleep"
        journal = self._waiting_journal()
        return self.drive(sleeping(journal, journal.name(name), seconds=length.total_seconds(), until=None))

    def sleep_until(self, moment: datetime, name: str = "sleep") -> Any:
        """Sleep until a moment, which must say its time zone."""
        if moment.tzinfo is None:
            raise StepMisused(f"sleep_until({moment}): the moment has no time zone")
        journal = self._waiting_journal()
        return self.drive(sleeping(journal, journal.name(name), seconds=None, until=moment))

    def wait_for_event(self, name: str, timeout: float | timedelta | None = None) -> Any:
        """Wait until somebody emits this event to the run, and return its payload; no worker slot is held meanwhile.

        Raises ``EventTimeout`` after ``timeout`` seconds. An event emitted before is not lost.
        """
        journal = self._waiting_journal()
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        return self.drive(waiting_for_event(journal, journal.name(name), name, seconds))

    def _waiting_journal(self) -> Journal:
        if lending.in_transaction():
            raise StepMisused("a transactional step cannot wait: its transaction would be open all the time")
        return self.journal

    # Children

    def gather(self, *calls: Any, return_exceptions: bool = False) -> Any:
        """Make calls (``fetch.s(url)``, or signatures of durable tasks) in parallel; returns their results in order.

        Each is a Celery task of this run; no worker slot is held while they are executed. The first error is raised,
        after all have ended. Where the run is executed in the calling process, so are they.
        """
        if not self._host.sends:
            return self._gather_here(calls, return_exceptions)
        pending = self._named(calls, None)
        step_id = self.journal.name("gather")

        def waiting() -> Waiting:
            self._send(calls, pending)
            outcome = self._host.outcome
            results = yield from results_of(
                self.journal, step_id, pending, outcome, return_exceptions=return_exceptions
            )
            return results

        return self.drive(waiting())

    def start(self, call: Any, *, step_id: str | None = None) -> Any:
        """Send a call as a task of this run without waiting for it; sent once, whatever is replayed.

        Pass what is returned to ``wait`` to get the result.
        """
        if not self._host.sends:
            raise StepMisused("ctx.start() sends tasks to workers; a run executed in the calling process has none")
        pending = self._named([call], step_id)

        def send() -> Pending:
            self._send([call], pending)
            return pending[0]

        return self._call(send)

    def _named(self, calls: Sequence[Any], step_id: str | None) -> list[Pending]:
        journal = self._waiting_journal()
        prepared = [self._host.prepared(call) for call in calls]
        given = [journal.name(step_id or call.name) for call in prepared]
        pending = [Pending(one, ids.call_id(journal.owner.task_id, one)) for one in given]
        for call, one in zip(prepared, pending, strict=True):
            self._saga.note_sent(one, call.compensate)
        return pending

    def _send(self, calls: Sequence[Any], pending: Sequence[Pending]) -> None:
        journal = self.journal
        journal.check()
        pairs = zip(calls, pending, strict=True)
        missing = [(call, one) for call, one in pairs if journal.sent(one.step_id) is None]
        if missing:
            journal.go_beyond(missing[0][1].step_id)
            if self._saga:
                journal.note_undo()
            self._host.send(missing)

    def start_child(
        self, workflow: Any, *args: Any, workflow_key: str | None = None, step_id: str | None = None, **kwargs: Any
    ) -> Any:
        """Start a run of another workflow, once; returns what ``wait`` takes, with the run's ``id``."""
        journal = self._waiting_journal()
        given = journal.name(step_id or workflow.name)

        def begin() -> Pending:
            found = journal.recall(given)
            if found is None:
                journal.go_beyond(given)
                started = self._host.start(workflow, args, kwargs, workflow_key or f"{self.id}/{given}")
                workflow_id, root_id = journal.succeed(given, list(started))
            else:
                workflow_id, root_id = journal.value(found)
            return Pending(given, root_id, workflow_id)

        return self._call(begin)

    def wait(self, *pending: Pending, return_exceptions: bool = False) -> Any:
        """Wait for what ``start`` and ``start_child`` have started; returns one result, or a list of several.

        The first error is raised, after all have ended.
        """
        journal = self._waiting_journal()
        waiting = results_of(
            journal, journal.name("wait"), pending, self._host.outcome, return_exceptions=return_exceptions
        )
        return self.drive(waiting if len(pending) != 1 else _single(waiting))

    def _gather_here(self, calls: Sequence[Any], return_exceptions: bool) -> Any:
        prepared = [self._host.prepared(call).given(self) for call in calls]
        attempts = [Attempt(self.journal, call, self.journal.name(call.name)) for call in prepared]
        if self.is_async:
            waiting = [self._perform_async(attempt) for attempt in attempts]
            return asyncio.gather(*waiting, return_exceptions=return_exceptions)
        results: list[Any] = []
        for attempt in attempts:
            try:
                results.append(self._perform(attempt))
            except Exception as error:
                if not return_exceptions:
                    raise
                results.append(error)
        return results

    # Transactions and compensation

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection of a transactional step: what is written on it commits with the step's checkpoint."""
        return lending.current().connection

    @property
    def session(self) -> OrmSession:
        """The same transaction as a SQLAlchemy session."""
        return lending.current().session

    def compensate(self, error: BaseException) -> Any:
        """Undo, in reverse order, what steps with a compensation have done: the function has failed for good."""
        return self._saga.undo_async(self, error) if self.is_async else self._saga.undo(self, error)

    # Colours

    def _call(self, work: Callable[[], Any]) -> Any:
        return self._in_thread(work) if self.is_async else work()

    def drive(self, waiting: Waiting) -> Any:
        """Drive a wait to its end."""
        if self.is_async:
            return self._drive_async(waiting)
        idle = threading.Event()
        while True:
            ended, value = _advance(waiting)
            if ended:
                return value
            idle.wait(value)

    async def _drive_async(self, waiting: Waiting) -> Any:
        bodies = self.journal.bodies
        with bodies.in_loop():
            while True:
                await bodies.look_around()
                ended, value = await self._in_thread(_advance, waiting)
                if ended:
                    return value
                await asyncio.sleep(value)

    async def _in_thread(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def bound() -> Any:
            with self._host.in_thread():
                return work(*args, **kwargs)

        return await asyncio.to_thread(bound)


def _advance(waiting: Waiting) -> tuple[bool, Any]:
    """Drive a wait to its next pause or its end; a future cannot carry ``StopIteration``."""
    try:
        return False, next(waiting)
    except StopIteration as end:
        return True, end.value


def _single(waiting: Waiting) -> Waiting:
    results = yield from waiting
    return results[0]
