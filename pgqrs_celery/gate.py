"""The ledger gate around a result backend: the ledger is asked first, and only what it accepts is stored.

Celery's tracer (in the child) and its ``Request`` (in the main process) report every outcome to ``task.backend``. For
durable tasks that is a ``LedgerBackend``: a thin shell around whatever backend the app configured.

* A failure or revocation is a fenced write; if another owner has the step, nothing is stored, no errback is called.
* A step that is SUCCESS stays SUCCESS: an error after that concerns its *hand-off*, and is recorded as such.
* After the wrapped backend has stored the outcome, the step is handed off and its run closed if nothing else is open.
"""

from __future__ import annotations

import json
import logging
import traceback as tracebacks
from collections.abc import Callable
from typing import Any, Final

from celery import states
from celery.backends.base import DisabledBackend
from celery.exceptions import NotRegistered
from kombu.exceptions import EncodeError

from pgqrs_celery import execution, ids
from pgqrs_celery.continuation import pass_on
from pgqrs_celery.durability import signature_ids
from pgqrs_celery.envelope import UNDOING, WAITER
from pgqrs_celery.exceptions import NotDurable, StoreUnavailable
from pgqrs_celery.execution import Execution, Phase
from pgqrs_celery.joint import Joint, shares_ledger
from pgqrs_celery.leases import bereave
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.recorder import Recorder
from pgqrs_celery.session import Session
from pgqrs_celery.store import inner, runs, steps
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.store.steps import BrokenHandOff

__all__ = ["LedgerBackend", "error_text", "give_up_hand_off", "hand_off", "recorded_error", "revocation", "tell_waiter"]

logger = logging.getLogger(__name__)

HAND_OFF_REPEATED: Final = "the hand-off of task %s is repeated by a relay: %s"

#: Errors of a hand-off that come again however often it is repeated.
PERMANENT: Final = (TypeError, EncodeError, NotRegistered, NotDurable)


def error_text(backend: Any, exc: BaseException, traceback: Any = None) -> str:
    """Return an exception as JSON text, in the form Celery's backends read back."""
    prepared = dict(backend.prepare_exception(exc, "json"))
    prepared["traceback"] = str(traceback) if traceback else "".join(tracebacks.format_exception(exc))
    return json.dumps(prepared, default=repr)


def revocation(reason: str) -> str:
    """Return the error of a revoked task as JSON text."""
    return json.dumps({"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions", "exc_message": [reason]})


def recorded_error(backend: Any, text: str | None) -> BaseException:
    """Return the exception that was recorded as this text."""
    found = backend.exception_to_python(json.loads(text)) if text else None
    return found if isinstance(found, BaseException) else RuntimeError(f"the step failed: {text}")


def tell_waiter(ledger: Ledger, request: Any) -> bool:
    """A task that a function has sent has ended: wake the function, if it waits for nothing else.

    Comes after the commit of the outcome and before the hand-off: what is not told (False) is told when a relay repeats
    the hand-off.
    """
    waiter = request.get(WAITER) if request is not None else None
    if not waiter:
        return True
    try:
        ledger.call(
            lambda session: inner.wake_waiter(session, waiter), patience=ledger.settings.patience, transaction=True
        )
    except StoreUnavailable as error:
        logger.warning("the function that waits for task %s is woken by a relay: %s", request.id, error)
        return False
    return True


def hand_off(ledger: Ledger, task_id: str, fence: int) -> None:
    """Note that everything that follows from a finished step has happened, then close its run if it is quiet.

    ``fence`` is that under which it was finished. A database that does not answer is no error here: the relay finds
    the step due and repeats the hand-off.
    """

    def work(session: Session) -> None:
        workflow_id = steps.hand_off(session, task_id, fence=fence)
        if workflow_id is not None:
            runs.close_if_quiet(session, workflow_id)

    try:
        ledger.call(work, patience=ledger.settings.patience)
    except StoreUnavailable as error:
        logger.warning(HAND_OFF_REPEATED, task_id, error)


def give_up_hand_off(
    ledger: Ledger, backend: Any, task_id: str, exc: BaseException, request: Any, broken: BrokenHandOff
) -> None:
    """What follows from a successful step cannot happen: say so once, and fail the run.

    The step keeps its success. The tasks that cannot follow fail, its chord learns of it, its errbacks are called.
    """
    logger.error("hand-off of step %r (task %s) cannot be done: %r; its run is FAILED", broken.step_id, task_id, exc)
    if not request.ignore_result:
        backend.store_result(task_id, ledger.values.load(broken.output), states.SUCCESS, request=request)
    for link in request.chain or ():
        for follower in signature_ids(link):
            backend.store_result(follower, exc, states.FAILURE)
    if request.chord:
        backend.on_chord_part_return(request, states.FAILURE, exc)
    if request.errbacks:
        backend._call_task_errbacks(request, exc, None)

    def give_up(session: Session) -> None:
        workflow_id = steps.give_up_hand_off(session, task_id, fence=broken.fence)
        if workflow_id is not None:
            runs.close_if_quiet(session, workflow_id)

    ledger.call(give_up, patience=ledger.settings.patience)


class LedgerBackend:
    """A result backend whose reports about durable tasks pass through the ledger first."""

    def __init__(self, wrapped: Any, ledger: Ledger, recorder: Recorder) -> None:
        self.wrapped = wrapped
        self.ledger = ledger
        self.recorder = recorder
        #: For what leaves no result anywhere.
        self.bare = Joint(ledger, recorder.shared_broker())
        #: Set where results are stored in the ledger's own transactions.
        self.joint = self.bare if shares_ledger(wrapped, ledger) else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Store a state, but STARTED only for a step that has been acquired: a duplicate must not hide a SUCCESS."""
        unacquired = request is not None and not request.is_eager and execution.of_request(request) is None
        if state == states.STARTED and unacquired:
            return result
        return self.wrapped.store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store a success, then hand the step off."""
        running = execution.of_request(request)
        if running is None:
            self.wrapped.mark_as_done(task_id, result, request, store_result, state)
            return
        if running.phase is Phase.LOST or (request.get(WAITER) and not self._settle_and_tell(running)):
            return
        if self.joint is not None:
            outcome = self.wrapped.outcome(task_id, result, state, request=request, store_result=store_result)
            self._finish_jointly(self.joint, running, outcome)
        elif not request.chord and not self._stores(store_result):
            self._finish_jointly(self.bare, running, Outcome(task_id, state))
        elif self._flush(running, going_on=True):
            self.wrapped.mark_as_done(task_id, result, request, store_result, state)
            self._hand_off(running)

    def _stores(self, store_result: bool) -> bool:
        """Return whether anything is stored of a task whose result is to be stored or not."""
        return store_result and not isinstance(self.wrapped, DisabledBackend)

    def _settle_and_tell(self, running: Execution) -> bool:
        """Commit a success that a function waits for, and tell it; False where the rest is left to others."""
        return self._flush(running) and tell_waiter(self.ledger, running.request)

    def _hand_off(self, running: Execution) -> None:
        """End a success' hand-off; where this thread goes on with what follows, it takes that with it."""
        guard, settings = running.guard, self.ledger.settings
        try:
            goes_on = pass_on(guard.task_id, guard.fence)
            if goes_on is None:
                hand_off(self.ledger, guard.task_id, guard.fence)
            elif not goes_on:  # whoever has the next one may have looked in vain whether the run is quiet
                self.ledger.call(
                    lambda session: runs.close_if_quiet(session, guard.workflow_id), patience=settings.patience
                )
        except StoreUnavailable as error:
            logger.warning(HAND_OFF_REPEATED, guard.task_id, error)

    def _flush(self, running: Execution, *, going_on: bool = False) -> bool:
        """Commit a success and send (or take) what follows; False where that is left to others."""
        try:
            return self.recorder.flush(running, going_on=going_on)
        except StoreUnavailable as error:
            logger.error("%s: its result cannot be recorded, it runs again: %s", running.guard, error)
            running.lose()
            return False

    def _finish_jointly(self, joint: Joint, running: Execution, outcome: Outcome) -> None:
        try:
            complete = joint.finish(self.recorder, running, outcome)
        except StoreUnavailable as error:
            logger.warning("task %s: its result is left to a relay: %s", outcome.task_id, error)
            return
        if complete and outcome.part is not None:
            self.wrapped.finish_chord(outcome.part.chord_id, running.request.chord)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Store a failure with its consequences, if the ledger accepts it, then hand the step off."""
        running = execution.of_request(request)
        if getattr(request, "is_eager", False):
            self.wrapped.mark_as_failure(task_id, exc, traceback, request, store_result, call_errbacks, state)
            return
        if running is not None and running.phase is Phase.SUCCEEDED and self._flush(running):
            self._hand_off_failed(running, exc, traceback)
            return
        fence = self._accept_failure(task_id, exc, traceback, request, running)
        if fence is None:
            logger.warning(
                "task %s: the failure %r is not stored, because another owner has the step or it is finished",
                task_id,
                exc,
            )
            return
        if not tell_waiter(self.ledger, request):
            return
        self.wrapped.mark_as_failure(task_id, exc, traceback, request, store_result, call_errbacks, state)
        hand_off(self.ledger, task_id, fence)

    def _accept_failure(
        self, task_id: str, exc: BaseException, traceback: Any, request: Any, running: Execution | None
    ) -> int | None:
        """Return the fence of a failure that counts."""
        if running is not None and running.phase is Phase.FAILED_BEFORE:
            return running.guard.fence
        text = error_text(self.wrapped, exc, traceback)
        if running is not None:
            if running.phase is not Phase.BODY or not running.guard.fail(text):
                return None
            running.phase = Phase.FAILED
            return running.guard.fence
        return self._main_process(
            lambda session: steps.fail(
                session,
                task_id,
                error=text,
                lease=self.ledger.settings.lease,
                worker_id=self.ledger.worker_id,
                generation=_generation(request),
                undoing=request is not None and bool(request.get(UNDOING)),
            ),
            task_id,
            undo_first=(text, _generation(request)),
        )

    def _main_process(
        self, write: Callable[[Session], int | None], task_id: str, *, undo_first: tuple[str, int] | None = None
    ) -> int | None:
        """Return the fence of a write by the main process that counts, None of one that does not.

        A task without a row is none of the ledger's business: its writes count, and there is nothing to hand off. No
        patience here: this thread runs the worker's event loop, and what is not written is due soon anyway. With
        ``undo_first`` (the error and generation of an end), a function that has done what can be undone does not end
        yet: it is executed for that.
        """

        def work(session: Session) -> int | None:
            if undo_first is not None:
                error, generation = undo_first
                if steps.undo_first(
                    session, task_id, error=error, generation=generation, worker_id=self.ledger.worker_id
                ):
                    logger.info("task %s is executed once more, to undo what it has done", task_id)
                    return None
            fence = write(session)
            return 0 if fence is None and steps.peek(session, task_id) is None else fence

        try:
            return self.ledger.call(work)
        except StoreUnavailable as error:
            logger.warning("task %s: its outcome is left to a relay: %s", task_id, error)
            return None

    def _hand_off_failed(self, running: Execution, exc: BaseException, traceback: Any) -> None:
        """Record why what follows from a successful step did not happen; give up where it never can."""
        settings, task_id, fence = self.ledger.settings, running.guard.task_id, running.guard.fence
        text = error_text(self.wrapped, exc, traceback)
        broken = self.ledger.call(
            lambda session: steps.hand_off_failed(
                session, task_id, fence=fence, error=text, interval=settings.resend_interval
            ),
            patience=settings.patience,
        )
        if broken is None:
            return
        if not isinstance(exc, PERMANENT) and broken.tries < settings.max_handoffs:
            logger.warning(
                "hand-off of step %r (task %s) failed, try %d of %d: %r; it is repeated in %.0f s",
                broken.step_id,
                task_id,
                broken.tries,
                settings.max_handoffs,
                exc,
                settings.resend_interval,
            )
            return
        give_up_hand_off(self.ledger, self.wrapped, task_id, exc, running.request, broken)

    def mark_as_retry(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        state: str = states.RETRY,
    ) -> Any:
        """Store RETRY where the retry was recorded, or where the worker gives a running step back."""
        running = execution.of_request(request)
        if running is not None and running.phase is not Phase.SUPERSEDED:
            return None

        def give_back(session: Session) -> int | None:
            return 0 if bereave(session, self.ledger, task_id, counted=False) else None

        gives_back = running is None and not getattr(request, "is_eager", False) and self.ledger.worker_id is not None
        if gives_back and self._main_process(give_back, task_id) is None:
            return None
        return self.wrapped.mark_as_retry(task_id, exc, traceback, request, store_result, state)

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Store REVOKED where the ledger lets the step be cancelled, then hand it off."""
        running = execution.of_request(request)
        if getattr(request, "is_eager", False):
            self.wrapped.mark_as_revoked(task_id, reason, request, store_result, state)
            return
        error = revocation(reason)
        fence = self._main_process(
            lambda session: steps.revoke(
                session,
                task_id,
                error=error,
                lease=self.ledger.settings.lease,
                generation=_generation(request),
                worker_id=self.ledger.worker_id,
                lease_token=running.guard.lease_token if running else None,
            ),
            task_id,
            undo_first=(error, _generation(request)) if running is None else None,
        )
        if fence is None:
            logger.info("task %s is not revoked: another owner has the step or it is finished", task_id)
            return
        if not tell_waiter(self.ledger, request):
            return
        self.wrapped.mark_as_revoked(task_id, reason, request, store_result, state)
        for link in getattr(request, "chain", None) or ():
            for follower in signature_ids(link):
                self.wrapped.mark_as_revoked(follower, reason, None, store_result, state)
        hand_off(self.ledger, task_id, fence)


def _generation(request: Any) -> int:
    if request is None:
        return 0
    return ids.generation(getattr(request, "replaced_task_nesting", 0), getattr(request, "retries", 0))
