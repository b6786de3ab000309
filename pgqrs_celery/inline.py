"""Executing a workflow function in the calling process: no worker, no broker, no event loop of ours.

The run is a row like any other, and so are its steps; only nobody sends it. Whoever calls the function executes it,
past what is recorded. If the function raises, the run is FAILED, and the next call resumes it; if the process is
killed, the run stays RUNNING, and the next call, in any process, takes it over at once.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from pgqrs_celery.calls import Call
from pgqrs_celery.context import Context
from pgqrs_celery.exceptions import LeaseLost, RunStateError, StepMisused, WorkflowKeyConflict
from pgqrs_celery.failures import dump_error
from pgqrs_celery.journal import Journal
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.states import Status
from pgqrs_celery.step import StepCall
from pgqrs_celery.store import inline, inner
from pgqrs_celery.store.runs import NewRun
from pgqrs_celery.waits import Pending

__all__ = ["InlineContext", "call", "create", "reopen"]


class InlineHost:
    """The calling process as the place where a function is executed."""

    sends = False

    def __init__(self, ledger: Ledger, workflow_id: int, outcome: Callable[[int], Any] | None) -> None:
        self.ledger = ledger
        self.workflow_id = workflow_id
        self._outcome = outcome

    def open(self) -> Journal:
        """Take the run's function and read what is recorded; raises ``RunStateError`` where the run has ended."""
        token = uuid4()

        def take(session: Session) -> Any:
            return inline.take(session, self.workflow_id, token)

        taken = self.ledger.call(take, transaction=True)
        if taken is None:
            raise RunStateError(f"run {self.workflow_id} has succeeded; there is nothing more to execute")
        owner, step_id = taken
        recorded = self.ledger.call(lambda session: inner.load(session, self.workflow_id, ""))
        return Journal(self.ledger, owner, "", recorded, reserved=step_id, parks=False)

    def prepared(self, call: Any) -> Call:
        """Return a call of a step, or of a durable task's function."""
        return prepared(call)

    def send(self, calls: Sequence[tuple[Any, Pending]]) -> None:
        """There is nobody to send to."""
        raise StepMisused("a run executed in the calling process has no workers to send tasks to")

    def start(self, workflow: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: str) -> tuple[int, str]:
        """Start a run of another workflow, in workers."""
        started: tuple[int, str] = workflow.start_child(args, kwargs, workflow_key=key, parent_task_id=None)
        return started

    def outcome(self, workflow_id: int) -> Any:
        """Return the result of a run that has ended."""
        if self._outcome is None:
            raise StepMisused("the result of another run needs an app: use Pgqrs(app).context(...)")
        return self._outcome(workflow_id)

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Any thread will do."""
        yield


def prepared(call: Any) -> Call:
    """Return a call of a ``@step``, or of a task's signature, as it would be made in this process."""
    if isinstance(call, StepCall):
        return call.prepared()
    name, task = call["task"], call.type
    return Call(name.rpartition(".")[2], task, tuple(call.args), dict(call.kwargs))


class InlineContext(Context):
    """The context of a run that the calling process executes."""

    def __init__(
        self,
        ledger: Ledger,
        workflow_id: int,
        name: str,
        *,
        is_async: bool = False,
        outcome: Callable[[int], Any] | None = None,
    ) -> None:
        host = InlineHost(ledger, workflow_id, outcome)
        super().__init__(workflow_id, name, host, is_async=is_async)
        self._ledger = ledger
        self._outcome = outcome
        #: Whether a function is being executed with this very context.
        self.executing = False

    def renewed(self, *, is_async: bool) -> InlineContext:
        """Return a context for another execution of the same run."""
        fresh = type(self)(self._ledger, self.id, self.name, is_async=is_async, outcome=self._outcome)
        fresh.executing = True
        return fresh

    def recorded(self) -> inline.InlineRun:
        """Return the run as it stands; raises ``RunNotFound``, ``RunStateError`` where it belongs to workers."""
        return self._ledger.call(lambda session: inline.find(session, self.id))

    def loaded(self, done: inline.InlineRun) -> Any:
        """Return the result of a run that has succeeded."""
        return self._ledger.values.load(done.output)

    def complete(self, value: Any = None) -> Any:
        """End the run with a result; raises ``LeaseLost`` where another process has taken it over."""
        return self._call(lambda: self.settle(value))

    def fail(self, error: BaseException | str) -> Any:
        """End the run with an error; executing it again resumes it."""
        failure = error if isinstance(error, BaseException) else StepMisused(error)
        return self._call(lambda: self.settle_failure(failure))

    def settle(self, value: Any) -> Any:
        """Record the function's result and return it as a second call of the function would."""
        self.journal.check()
        text = self._ledger.values.dump_result(value, self.name)
        self._settle(output=text)
        return self._ledger.values.load(text)

    def settle_failure(self, error: BaseException) -> None:
        """Record the function's error."""
        if self.journal.ended is None:
            self._settle(error=dump_error(error))

    def _settle(self, *, output: str | None = None, error: str | None = None) -> None:
        owner = self.journal.owner

        def work(session: Session) -> bool:
            return inline.settle(session, owner, output=output, error=error)

        if not self._ledger.call(work, transaction=True):
            raise LeaseLost(f"run {self.id}: another process executes it by now, or it was cancelled")


def create(
    ledger: Ledger,
    name: str,
    argument: Any = None,
    *,
    workflow_key: str | None = None,
    is_async: bool = False,
    outcome: Callable[[int], Any] | None = None,
) -> InlineContext:
    """Enter a new run, to be executed in the calling process, and return its context.

    With a ``workflow_key`` that a run has already, the context is that run's. Raises ``WorkflowKeyConflict`` where it
    is a run of another workflow.
    """
    root_id = str(uuid4())
    run = NewRun(
        ledger.app,
        root_id,
        name,
        workflow_key=workflow_key,
        input=ledger.values.dump(argument),
        result=json.dumps([[root_id, None], None]),
    )
    workflow_id, entered = ledger.call(lambda session: inline.create(session, run))
    if entered != name:
        raise WorkflowKeyConflict(f"workflow key {workflow_key!r} belongs to run {workflow_id} of workflow {entered!r}")
    return InlineContext(ledger, workflow_id, name, is_async=is_async, outcome=outcome)


def reopen(
    ledger: Ledger, workflow_id: int, *, is_async: bool = False, outcome: Callable[[int], Any] | None = None
) -> InlineContext:
    """Return the context of an existing run; raises ``RunNotFound``, and ``RunStateError`` if it is the workers'."""
    found = ledger.call(lambda session: inline.find(session, workflow_id))
    return InlineContext(ledger, workflow_id, found.name, is_async=is_async, outcome=outcome)


def call(function: Callable[..., Any], context: InlineContext, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Execute a workflow function with a run's context; awaitable where the function is ``async def``.

    A run that has succeeded is not executed again: its recorded result is returned. Called with a context that is
    being executed already, the function is a part of that execution.
    """
    if context.executing:
        return function(context, *args, **kwargs)
    if inspect.iscoroutinefunction(function):
        return _call_async(function, context.renewed(is_async=True), args, kwargs)
    return _call(function, context.renewed(is_async=False), args, kwargs)


def _call(function: Callable[..., Any], context: InlineContext, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    done = context.recorded()
    if done.run_status == Status.SUCCESS:
        return context.loaded(done)
    try:
        value = function(context, *args, **kwargs)
    except Exception as error:
        context.compensate(error)
        context.settle_failure(error)
        raise
    return context.settle(value)


async def _call_async(
    function: Callable[..., Any], context: InlineContext, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    done = await asyncio.to_thread(context.recorded)
    if done.run_status == Status.SUCCESS:
        return context.loaded(done)
    await asyncio.to_thread(lambda: context.journal)
    try:
        value = await function(context, *args, **kwargs)
    except Exception as error:
        await context.compensate(error)
        await asyncio.to_thread(context.settle_failure, error)
        raise
    return await asyncio.to_thread(context.settle, value)
