"""Builders of the guides: ``workflow(name).trigger(params)`` and ``run().message(message)``, and what executes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from pgqrs_celery.compat import pgqrs_context
from pgqrs_celery.compat.pgqrs_consumer import Consumer, Message
from pgqrs_celery.compat.pgqrs_context import PyWorkflow
from pgqrs_celery.compat.pgqrs_decorators import InlineWorkflow
from pgqrs_celery.compat.pgqrs_poll import Poller
from pgqrs_celery.compat.pgqrs_store import RunResult, Store
from pgqrs_celery.exceptions import ConfigurationError, WorkflowNotDefined
from pgqrs_celery.states import Status
from pgqrs_celery.store import consumed
from pgqrs_celery.store.runs import NewRun

__all__ = ["RunBuilder", "Trigger", "WorkflowBuilder", "run", "workflow"]


@dataclass(frozen=True, slots=True)
class Trigger:
    """A run that is to be entered."""

    name: str
    params: Any

    async def execute(self, store: Store) -> int:
        """Enter the run for a consumer to take, and return its id.

        Raises ``WorkflowNotDefined`` where ``store.create_workflow`` was never called with the name.
        """
        ledger = store.ledger
        root_id = str(uuid4())
        result = json.dumps([[root_id, None], None])
        new = NewRun(ledger.app, root_id, self.name, input=ledger.values.dump(self.params), result=result)

        def enter(session: Any) -> int | None:
            if not consumed.is_defined(session, app=ledger.app, name=self.name):
                return None
            return consumed.enqueue(session, new)

        run_id = await store.call(enter)
        if run_id is None:
            raise WorkflowNotDefined(
                f"workflow {self.name!r} is not defined; define it once with "
                f"`await store.create_workflow({self.name!r})`"
            )
        return run_id


@dataclass(frozen=True, slots=True)
class WorkflowBuilder:
    """A workflow by its name; ``workflow("name")`` and ``workflow().name("name")`` are the same."""

    given: str | None = None
    function: InlineWorkflow | None = None

    def name(self, name: str | InlineWorkflow) -> WorkflowBuilder:
        """Say which workflow, by its name or by its decorated function."""
        return WorkflowBuilder(name) if isinstance(name, str) else WorkflowBuilder(name.name, name)

    def consumer(self, consumer: Consumer) -> Poller:
        """Let a consumer execute the decorated function, with ``await ….poll(store)``."""
        if self.function is None:
            raise ConfigurationError("workflow(…).consumer(…) needs the decorated function: workflow(function)")
        return Poller(consumer, self.function)

    def _named(self) -> str:
        if self.given is None:
            raise ConfigurationError("workflow(): which one? Use workflow(name), or workflow().name(name)")
        return self.given

    def trigger(self, params: Any = None) -> Trigger:
        """Describe a run with this input."""
        return Trigger(self._named(), params)

    async def get_run(self, run_id: int | Message, store: Store) -> RunResult:
        """Return a run of this workflow as it stands; raises ``RunNotFound``.

        A run and its message have the same id.
        """
        name = self._named()
        found = await store.get_run(run_id if isinstance(run_id, int) else run_id.id)
        if found.name != name:
            raise ConfigurationError(f"run {found.id} is one of workflow {found.name!r}, not of {name!r}")
        return found


@dataclass(frozen=True, slots=True)
class RunBuilder:
    """A run by its message, or by its id."""

    _message: Message | int | None = None
    _store: Store | None = None

    def message(self, message: Message | int) -> RunBuilder:
        """Say which run: a message that was dequeued, or the id that ``trigger`` returned."""
        return replace(self, _message=message)

    def store(self, store: Store) -> RunBuilder:
        """Say where."""
        return replace(self, _store=store)

    def _complete(self) -> tuple[Message | int, Store]:
        if self._message is None or self._store is None:
            raise ConfigurationError("run(): which one, and where? Use run().message(message).store(store)")
        return self._message, self._store

    async def execute(self) -> PyWorkflow:
        """Return the context to execute the run with; the run of a message is the consumer's that dequeued it."""
        message, store = self._complete()
        if isinstance(message, Message):
            return PyWorkflow(store, message.id, message.claim.name, claim=message.claim)
        return await pgqrs_context.reopen(store, message)

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the run's end and return its output; raises its error, or ``TimeoutError``."""
        message, store = self._complete()
        return (await store.wait_for_run(message if isinstance(message, int) else message.id, timeout)).value()

    async def get(self) -> Any:
        """Return the run's output without waiting, None where it has none yet; raises its error."""
        message, store = self._complete()
        found = await store.get_run(message if isinstance(message, int) else message.id)
        return found.value() if found.status in (Status.FAILED, Status.CANCELLED) else found.output


def workflow(name: str | InlineWorkflow | None = None) -> WorkflowBuilder:
    """Name a workflow, to trigger it or to look at its runs."""
    return WorkflowBuilder() if name is None else WorkflowBuilder().name(name)


def run() -> RunBuilder:
    """Begin to describe a run."""
    return RunBuilder()
