"""Handles on runs: followed, resumed, cancelled, paused by whoever has one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery import states
from celery._state import task_join_will_block  # type: ignore[attr-defined]
from celery.backends.base import DisabledBackend
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult, result_from_tuple

from pgqrs_celery.durability import signature_ids
from pgqrs_celery.envelope import Envelope
from pgqrs_celery.exceptions import RunCancelled, RunFailed, RunNotFound, RunStateError, RunTimeout
from pgqrs_celery.finish import backend_for
from pgqrs_celery.gate import recorded_error
from pgqrs_celery.joint import shares_ledger
from pgqrs_celery.records import RunRecord, StepRecord
from pgqrs_celery.session import Session
from pgqrs_celery.states import TERMINAL, Status
from pgqrs_celery.store import chords, runs, steps
from pgqrs_celery.store.runs import Run

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs

__all__ = ["EagerRun", "WorkflowRun"]

#: Steps cancelled in one transaction.
CANCEL_BATCH: Final = 200
#: Seconds between two looks at a run that is waited for: the first, and the longest.
FIRST_PAUSE: Final = 0.001
LOOK: Final = 1.0


class WorkflowRun:
    """A handle on one run; it holds nothing but the id."""

    def __init__(self, pgqrs: Pgqrs, workflow_id: int) -> None:
        self.pgqrs = pgqrs
        self.id = workflow_id

    def __repr__(self) -> str:
        return f"<WorkflowRun {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkflowRun) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def record(self) -> RunRecord:
        """The run as it stands; raises ``RunNotFound``."""
        record = self.pgqrs.monitor.run(self.id)
        if record is None:
            raise RunNotFound(f"run {self.id} does not exist (or was removed by retention)")
        return record

    @property
    def status(self) -> Status:
        """How the run stands."""
        return Status(self.record.status)

    @property
    def result(self) -> AsyncResult[Any] | GroupResult | None:
        """The Celery result in which the run's outcome appears, where the result backend keeps it."""
        text = self.record.result
        return result_from_tuple(json.loads(text), app=self.pgqrs.app) if text else None

    def steps(self) -> list[StepRecord]:
        """Return the run's steps in the order they came."""
        return self.pgqrs.monitor.steps(self.id)

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> Any:
        """Wait for the run's end and return its result, read from the ledger.

        Raises the failed step's exception (or ``RunFailed``), ``RunCancelled``, or ``RunTimeout``. With
        ``propagate=False`` a run that did not succeed returns None.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, waiter = FIRST_PAUSE, threading.Event()
        announced: AsyncResult[Any] | None = None
        first = True
        while True:
            run = self.pgqrs.ledger.call(lambda session: runs.find(session, workflow_id=self.id))
            if run is None:
                raise RunNotFound(f"run {self.id} does not exist (or was removed by retention)")
            if run.status in TERMINAL:
                return self._outcome(run, propagate)
            left = LOOK if deadline is None else min(LOOK, deadline - time.monotonic())
            if left <= 0:
                raise RunTimeout(f"run {self.id} is still {run.status} after {timeout:g} s")
            if first:
                announced, first = self._announced_result(run.result), False
            if announced is None:
                waiter.wait(min(pause, left))
                pause = min(pause * 1.5, LOOK / 2)
                continue
            try:
                announced.get(timeout=left, propagate=False)
                announced = None  # the run closes a moment later
            except CeleryTimeout:
                continue

    def _announced_result(self, shape: str | None) -> AsyncResult[Any] | None:
        """The result that comes with the run's end, where the result backend announces it; else there is polling."""
        app = self.pgqrs.app
        if shape is None or task_join_will_block() or not shares_ledger(app.backend, self.pgqrs.ledger):
            return None
        result = result_from_tuple(json.loads(shape), app=app)
        return result if isinstance(result, AsyncResult) else None

    def _outcome(self, run: Run, propagate: bool) -> Any:
        values = self.pgqrs.ledger.values
        if run.status == Status.SUCCESS:
            shape = json.loads(run.result) if run.result else None
            if shape is None or run.output is not None:
                return values.load(run.output)
            outputs = self.pgqrs.monitor.outputs(self.id, list(leaf_ids(shape)))
            return shaped(shape, {task_id: values.load(text) for task_id, text in outputs.items()})
        if not propagate:
            return None
        if run.status == Status.CANCELLED:
            raise RunCancelled(f"run {self.id} was cancelled")
        cause = json.loads(run.error) if run.error else {}
        if cause.get("error"):
            raise recorded_error(self.pgqrs.app.backend, json.dumps(cause["error"]))
        raise RunFailed(f"run {self.id} failed at step {cause.get('step_id')!r}")

    def resume(self) -> WorkflowRun:
        """Set a failed run going again: completed steps are not run again, failed ones are.

        Raises ``RunStateError`` where the run is not FAILED. Errbacks that were called are not undone, and a
        ``get()`` that has raised has raised.
        """
        pgqrs = self.pgqrs

        def work(session: Session) -> None:
            queued, anew = runs.resume(session, self.id)
            for task_id, _, message in queued:
                self._forget(session, task_id, message)
            for task_id, name in anew:
                forget(backend_for(pgqrs.app, name), [task_id])
            for chord in chords.reopen(session, self.id):
                if chord.body_id:
                    pgqrs.app.backend.forget(chord.body_id)
            runs.notify(session, pgqrs.ledger.channel)

        pgqrs.ledger.call(work, transaction=True)
        return self

    def _forget(self, session: Session, task_id: str, message: str) -> None:
        """Forget the FAILURE of a step and of what should have followed it: waiters wait for the new outcome."""
        envelope = self.pgqrs.read_message(session, self.id, message)
        forget(backend_for(self.pgqrs.app, envelope.name), [task_id, *followers(envelope)])

    def cancel(self, *, terminate: bool = False) -> WorkflowRun:
        """Cancel the run: nothing of it begins any more, and what has not finished is REVOKED.

        A body that runs goes on, but is not recorded; ``terminate`` kills its process as ``revoke`` does. Functions
        undo what they have done. Raises ``RunStateError`` where the run has ended.
        """
        ledger = self.pgqrs.ledger
        if not ledger.call(lambda session: runs.cancel(session, self.id)):
            raise RunStateError(f"run {self.id} is {self.status}; it cannot be cancelled any more")
        waiter = threading.Event()
        while True:
            cancelled = ledger.call(lambda session: steps.cancel_batch(session, self.id, batch=CANCEL_BATCH))
            if cancelled and terminate:
                self.pgqrs.app.control.revoke([task_id for task_id, _ in cancelled], terminate=True)
            if not cancelled:
                if not ledger.call(lambda session: steps.unfinished(session, self.id)):
                    break
                waiter.wait(0.02)
        ledger.call(lambda session: runs.notify(session, ledger.channel))
        return self

    def pause(self) -> WorkflowRun:
        """Let no further step begin until ``unpause()``. Raises ``RunStateError`` where the run has ended."""
        if not self.pgqrs.ledger.call(lambda session: runs.pause(session, self.id)):
            raise RunStateError(f"run {self.id} is {self.status}; it cannot be paused any more")
        return self

    def unpause(self) -> WorkflowRun:
        """Let steps begin again. Raises ``RunStateError`` where the run was not paused."""
        ledger = self.pgqrs.ledger

        def work(session: Session) -> bool:
            runs.notify(session, ledger.channel)
            return runs.unpause(session, self.id)

        if not ledger.call(work, transaction=True):
            raise RunStateError(f"run {self.id} is not paused")
        return self


class EagerRun(WorkflowRun):
    """What a named canvas is when ``task_always_eager`` is set: executed already, in this process, and not recorded.

    It answers ``get()``, ``status`` and ``result``; its ``id`` is 0, for there is no row.
    """

    def __init__(self, pgqrs: Pgqrs, name: str, result: Any) -> None:
        super().__init__(pgqrs, 0)
        self.name = name
        self._result = result

    def __repr__(self) -> str:
        return f"<EagerRun of {self.name}>"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return object.__hash__(self)

    @property
    def record(self) -> NoReturn:
        """There is none."""
        raise RunNotFound(
            f"workflow {self.name!r} was executed with task_always_eager: there is no record of it. Test what needs "
            "one with a worker (celery.contrib.testing.worker.start_worker), or with Celery's eager mode switched off"
        )

    @property
    def status(self) -> Status:
        """How the run ended."""
        if self._result.successful():
            return Status.SUCCESS
        revoked = getattr(self._result, "state", None) == states.REVOKED
        return Status.CANCELLED if revoked else Status.FAILED

    @property
    def result(self) -> Any:
        """Celery's ``EagerResult``, or a ``GroupResult`` of them."""
        return self._result

    def steps(self) -> list[StepRecord]:
        """Return nothing: no step is recorded."""
        return []

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> Any:
        """Return the result, or raise the error of the task that failed; see ``WorkflowRun.get``."""
        if not propagate and self.status is not Status.SUCCESS:
            return None
        return self._result.get(timeout=timeout, disable_sync_subtasks=False)

    def resume(self) -> NoReturn:
        """It has ended, and is not recorded."""
        self._refuse("resumed")

    def cancel(self, *, terminate: bool = False) -> NoReturn:
        """It has ended, and is not recorded."""
        self._refuse("cancelled")

    def pause(self) -> NoReturn:
        """It has ended, and is not recorded."""
        self._refuse("paused")

    def unpause(self) -> NoReturn:
        """It has ended, and is not recorded."""
        self._refuse("continued")

    def _refuse(self, what: str) -> NoReturn:
        raise RunStateError(
            f"workflow {self.name!r} was executed with task_always_eager: it has ended, and cannot be {what}"
        )


def forget(backend: Any, task_ids: Sequence[str]) -> None:
    """Remove results from a backend that keeps any."""
    if not isinstance(backend, DisabledBackend):
        for task_id in task_ids:
            backend.forget(task_id)


def followers(envelope: Envelope) -> set[str]:
    """Return the ids of the tasks that follow a message: the rest of its chain, and the body of its chord."""
    embed = envelope.body[2]
    found = {task_id for link in embed.get("chain") or () for task_id in signature_ids(link)}
    return found | (signature_ids(embed["chord"]) if embed.get("chord") else set())


def leaf_ids(shape: Any) -> list[str]:
    """Return the task ids in a result tuple."""
    (own, _), children = shape
    return [own] if children is None else [leaf for child in children for leaf in leaf_ids(child)]


def shaped(shape: Any, outputs: Mapping[str, Any]) -> Any:
    """Return results in the shape of a result tuple: a value, or a list for a group."""
    (own, _), children = shape
    return outputs.get(own) if children is None else [shaped(child, outputs) for child in children]
