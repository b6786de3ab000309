"""DurableTask: the one page where Celery meets the guard.

Celery's tracer calls the task; the task asks the ledger. What the answer means to Celery:

========== ==========================================================================================
UNDO       the same for a function that has ended outside of its body, but to undo what it has done
EXECUTE    run the body, commit its result, return it; the tracer then sends what follows
REPLAY     return the recorded result (or raise the recorded error) without running the body: a former
           owner died between its commit and the end of its hand-off, and the tracer repeats the latter
CANCELLED  store REVOKED, then ``Ignore``
others     ``Ignore``: the step is done, in other hands, newer than this message, or parked
========== ==========================================================================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

from celery import Celery, Task, states
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError

from pgqrs_celery import continuation, execution, ids
from pgqrs_celery.adoption import adoption
from pgqrs_celery.enqueue import enqueueing
from pgqrs_celery.envelope import MARKER, SENT
from pgqrs_celery.exceptions import ConfigurationError, LeaseLost, StoreError, StoreUnavailable
from pgqrs_celery.execution import Execution, Phase
from pgqrs_celery.gate import LedgerBackend, error_text, recorded_error
from pgqrs_celery.guard import Decision, StepGuard
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.store import runs
from pgqrs_celery.store.steps import Verdict

__all__ = ["BorrowedTask", "DurableTask", "ledger_of"]

logger = logging.getLogger(__name__)


def ledger_of(app: Celery) -> Ledger:
    """Return the app's ledger; raises ``ConfigurationError`` where ``Pgqrs(app)`` was not called."""
    pgqrs = getattr(app, "pgqrs", None)
    if pgqrs is None:
        raise ConfigurationError(f"app {app.main!r} has durable tasks but no ledger: call pgqrs_celery.Pgqrs(app)")
    ledger: Ledger = pgqrs.ledger
    return ledger


class DurableTask(Task):  # type: ignore[type-arg]
    """A Celery task whose every execution goes through the ledger.

    Called directly, with ``apply()`` or with ``task_always_eager`` it is an ordinary function.
    """

    abstract = True
    pgqrs_durable = True
    pgqrs_kind = "canvas"
    Request = continuation.REQUEST
    _tracer: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly:
            return super().__call__(*args, **kwargs)
        if request.is_eager or execution.of_request(request) is not None or not self.is_recorded(request.__dict__):
            return self.run(*args, **kwargs)
        return perform(self, request, args, kwargs)

    @classmethod
    def is_recorded(cls, headers: Mapping[str, Any]) -> bool:
        """Return whether a message of this task with these headers belongs in the ledger."""
        return True

    @property
    def __trace__(self) -> Any:
        """Celery's tracer of this task, which goes on with what follows while it may (``continuation``)."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, tracer: Any) -> None:
        self._tracer = continuation.going_on(tracer) if tracer is not None else None

    @property
    def backend(self) -> Any:
        """The configured result backend behind the ledger's gate."""
        raw = self.raw_backend
        gate = raw.__dict__.get("_pgqrs_gate")
        if gate is None:
            app: Any = self.app
            gate = raw.__dict__["_pgqrs_gate"] = LedgerBackend(raw, ledger_of(app), app.pgqrs.recorder)
        return gate

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    @property
    def raw_backend(self) -> Any:
        """The configured result backend itself."""
        own = self._backend
        return own if own is not None else self.app.backend

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Any:  # noqa: N802
        """Return the result handle of one of this task's executions."""
        return self.app.AsyncResult(task_id, backend=self.raw_backend, task_name=self.name, **kwargs)

    def signature(self, args: Any = None, *starargs: Any, **starkwargs: Any) -> Any:
        """Return a signature that is recorded by every service, also by one that does not know this task."""
        signature: Any = super().signature(args, *starargs, **starkwargs)
        signature.options["headers"] = {MARKER: 1, **(signature.options.get("headers") or {})}
        return signature

    subtask = signature

    def enqueue_using(self, connection: Any, *args: Any, **kwargs: Any) -> Any:
        """Send the task in the caller's own transaction: it exists, and is sent, if and only if that commits.

        ``connection`` is a psycopg connection, a SQLAlchemy connection or session, or a Django connection or alias,
        to the ledger's database. Returns the result handle ``apply_async`` would.
        """
        with enqueueing(connection, ledger_of(self.app).database.texts):
            return self.apply_async(args, kwargs)

    def undo(self, running: Execution, error: Exception, args: Any, kwargs: Any) -> None:
        """Undo what former executions have done; only functions know what that is."""

    def on_replace(self, sig: Any) -> Any:
        """Let a canvas take this task's place: its rows, and the end of this execution, are one transaction."""
        running = execution.of_request(self.request)
        if running is None or self.request.is_eager:
            return super().on_replace(sig)
        nesting = (self.request.replaced_task_nesting or 0) + 1
        last_link(sig).options["replaced_task_nesting"] = nesting
        running.replaced_by = ids.generation(nesting, 0)
        with self.app.producer_or_acquire():
            sig.delay()
        raise Ignore("Replaced by new task")


class BorrowedTask(DurableTask):
    """One of Celery's own tasks (``accumulate``, ``map`` …): durable where its message is, plain elsewhere."""

    abstract = True
    pgqrs_durable = False

    @classmethod
    def is_recorded(cls, headers: Mapping[str, Any]) -> bool:
        """Return whether the message was marked when it was sent."""
        return bool(headers.get(MARKER))

    def signature(self, args: Any = None, *starargs: Any, **starkwargs: Any) -> Any:
        """Return a signature that is marked when a durable task makes it."""
        if execution.current() is not None:
            return super().signature(args, *starargs, **starkwargs)
        return Task.signature(self, args, *starargs, **starkwargs)

    subtask = signature


def last_link(signature: Any) -> Any:
    """Return the simple signature that a canvas ends with: the one that carries the canvas' id."""
    while True:
        kind = signature.get("subtask_type")
        if kind == "chain":
            signature = signature.tasks[-1]
        elif kind == "chord":
            signature = signature.body
        else:
            return signature


def perform(task: DurableTask, request: Any, args: Any, kwargs: Any) -> Any:
    """Execute or replay one durable task in a worker; see the table above."""
    ledger = ledger_of(task.app)
    following = continuation.following_of(request)
    if following is not None and following.guard is not None:
        return execute(task, request, Execution(following.guard, Phase.BODY, request), args, kwargs)
    try:
        decision = StepGuard.acquire(
            ledger,
            request.id,
            generation=ids.generation(request.replaced_task_nesting, request.retries),
            adoption=None if request.get(SENT) else adoption(task, request, ledger),
            lease_token=following.lease_token if following is not None else None,
        )
    except StoreUnavailable as error:
        logger.warning("task %s goes back to its queue: %s", request.id, error)
        raise Reject(error, requeue=True) from error
    if decision.guard is None:
        leave(task, request, decision)
    if decision.verdict is Verdict.REPLAY:
        return replay(task, request, ledger, decision, decision.guard)
    running = Execution(decision.guard, Phase.BODY, request)
    return execute(task, request, running, args, kwargs, decision)


def execute(
    task: DurableTask, request: Any, running: Execution, args: Any, kwargs: Any, decision: Decision | None = None
) -> Any:
    """Execute the body of a step that is ours, or undo what former executions have done where that was decided."""
    ledger = running.guard.ledger
    setattr(request, execution.ATTRIBUTE, running)
    announce_start(task, request)
    try:
        check_deadline(running)
        if decision is not None and decision.verdict is Verdict.UNDO:
            undo(task, request, running, decision.error, args, kwargs)
        return finish_body(running, task.run(*args, **kwargs))
    except LeaseLost as lost:
        logger.warning("%s; what this worker did is not recorded", lost)
        raise Ignore(str(lost)) from lost
    except Retry as retry:
        if running.phase is not Phase.SUPERSEDED:
            raise Ignore("the retry was not recorded: another owner has the step, or its run was cancelled") from retry
        raise
    except Reject as reject:
        rejected(task, request, running, reject)
    except Ignore:
        if running.phase is Phase.BODY:
            dropped(task, ledger, running)
        raise
    except Exception as error:
        running.fail_for_good(error)
        raise


def check_deadline(running: Execution) -> None:
    """Raise ``LeaseLost`` where the lease is over before the body has begun; nobody need wait for such a step."""
    guard = running.guard
    try:
        guard.check_deadline()
    except LeaseLost:
        with suppress(StoreUnavailable):  # then it is due by its lease
            guard.give_back()
        raise


def announce_start(task: DurableTask, request: Any) -> None:
    """Store STARTED where the task wants that; the gate lets it pass only for a step that was acquired.

    A backend that does not take it is no reason to end a step that has not begun.
    """
    if task.track_started and not request.ignore_result:
        meta = {"pid": os.getpid(), "hostname": request.hostname}
        try:
            task.raw_backend.store_result(request.id, meta, states.STARTED, request=request)
        except Exception as error:  # noqa: BLE001 - whatever the backend in use raises
            logger.warning("task %s: STARTED is not stored: %r", request.id, error)


def finish_body(running: Execution, value: Any) -> Any:
    """Make the body's result ready to be committed, and return it as a replay would see it; ``Ignore`` after a retry.

    It is committed together with the first thing that follows from it: the next link's row, or the task result. A
    transactional body has committed it already.
    """
    if running.phase is Phase.SUPERSEDED:
        raise Ignore("retried")
    if running.phase is Phase.SUCCEEDED:
        return running.value
    values = running.guard.ledger.values
    running.uncommitted = values.dump_result(value, running.guard.step_id)
    running.value = values.load(running.uncommitted)
    running.phase = Phase.SUCCEEDED
    return running.value


def undo(task: DurableTask, request: Any, running: Execution, text: str | None, args: Any, kwargs: Any) -> NoReturn:
    """Undo what a function has done that was cancelled, or has ended outside of its body; then let it end so."""
    error = recorded_error(task.raw_backend, text)
    logger.info("%s has ended with %r; undoing what it has done", running.guard, error)
    task.undo(running, error if isinstance(error, Exception) else RuntimeError(repr(error)), args, kwargs)
    if isinstance(error, TaskRevokedError):
        task.backend.mark_as_revoked(request.id, str(error), request=request)
        running.phase = Phase.SUPERSEDED
        raise Ignore(str(error)) from error
    if not running.guard.fail(text or error_text(task.raw_backend, error)):
        raise LeaseLost(f"{running.guard}: finished by or given to another worker")
    running.phase = Phase.FAILED_BEFORE
    raise error


def replay(task: DurableTask, request: Any, ledger: Ledger, decision: Decision, guard: StepGuard) -> Any:
    """Let the tracer repeat the hand-off of a finished step."""
    running = Execution(guard, Phase.FAILED_BEFORE if decision.failed else Phase.SUCCEEDED, request)
    setattr(request, execution.ATTRIBUTE, running)
    logger.info("step %r of run %s is finished; repeating its hand-off", guard.step_id, guard.workflow_id)
    if decision.failed:
        raise recorded_error(task.raw_backend, decision.error)
    running.value = ledger.values.load(decision.output)
    return running.value


def leave(task: DurableTask, request: Any, decision: Decision) -> NoReturn:
    """End an execution that has nothing to do."""
    if decision.verdict is Verdict.CANCELLED:
        task.backend.mark_as_revoked(request.id, "the run was cancelled", request=request)
    logger.info("task %s[%s] is left alone: %s", task.name, request.id, decision.verdict)
    raise Ignore(str(decision.verdict))


def rejected(task: DurableTask, request: Any, running: Execution, reject: Any) -> NoReturn:
    """The body rejected its message: back into the queue, or failed for good."""
    cause = reject.reason
    if isinstance(cause, StoreError):
        running.phase = Phase.SUPERSEDED
        logger.warning("task %s: its retry could not be recorded; it runs again: %s", request.id, cause)
    elif running.phase is Phase.BODY and reject.requeue:
        running.guard.give_back()
        running.phase = Phase.SUPERSEDED
    elif running.phase is Phase.BODY:
        task.backend.mark_as_failure(request.id, cause if isinstance(cause, BaseException) else reject, request=request)
    raise Ignore("rejected") from reject


def dropped(task: DurableTask, ledger: Ledger, running: Execution) -> None:
    """The body asked to be ignored: its step is cancelled, and the run closes if nothing else is open."""
    error = error_text(task.raw_backend, Ignore("the task raised Ignore"))
    workflow_id = running.guard.drop(error)
    running.phase = Phase.SUPERSEDED
    if workflow_id is not None:
        ledger.call(lambda session: runs.close_if_quiet(session, workflow_id), patience=ledger.settings.patience)
