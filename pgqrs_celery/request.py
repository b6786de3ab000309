"""DurableRequest: what the worker's main process does with the message of a durable task.

It enters itself in the ledger's holdings, so that the lease keeper knows what this worker has, and turns the death of
a pool process into "due at once" instead of a failure.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from typing import Any

from billiard.common import TERM_SIGNAME
from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]
from billiard.exceptions import Terminated, WorkerLostError
from celery.platforms import signals
from celery.worker import request as celery_request
from celery.worker import state
from celery.worker.state import requests, reserved_requests, task_ready

from pgqrs_celery import ids
from pgqrs_celery.board import Entry
from pgqrs_celery.envelope import SENT, UNDOING
from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.leases import bereave
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.task import ledger_of

__all__ = ["DurableRequest"]

logger = logging.getLogger(__name__)

Request: Any = celery_request.Request

#: The messages of one task that this process has at the same time, where there are several: a copy, or a function that
#: was sent again at once. Celery knows the newest of them, and none any more when one has ended.
_several: dict[str, weakref.WeakSet[DurableRequest]] = {}
_noting = threading.Lock()  # threads of a pool end their messages themselves


class DurableRequest(Request):  # type: ignore[misc]
    """A request the lease keeper knows about."""

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self._ledger: Ledger = ledger_of(self.app)
        other = requests.get(self.id)
        if other is not None:
            with _noting:
                _several.setdefault(self.id, weakref.WeakSet([other])).add(self)
        holdings, key = self._ledger.holdings, id(self)
        holdings.enter(key, self.id)
        weakref.finalize(self, holdings.leave, key)
        with suppress(TypeError, ValueError):  # there is none, or somebody has made one up
            holdings.received(route(self.delivery_info), datetime.fromisoformat(self.request_dict.get(SENT)))

    def __init_subclass__(cls, **options: Any) -> None:
        """Celery makes a subclass per task with an ``on_success`` of its own that does not call ours."""
        super().__init_subclass__(**options)
        own = cls.__dict__.get("on_success")
        if own is not None:

            def on_success(self: DurableRequest, outcome: Any, **kwargs: Any) -> Any:
                with self._leaving():
                    return own(self, outcome, **kwargs)

            cls.on_success = on_success

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """This process is done with the message, as Celery notes in the block; it is to know the others of the task."""
        self._ledger.holdings.leave(id(self))
        try:
            yield
        finally:
            others = self._others()
            if others:
                requests[self.id] = others[-1]
            else:
                _several.pop(self.id, None)

    def _others(self) -> list[DurableRequest]:
        """Return the other messages of the task that this process has; one that is being executed comes last."""
        if self.id not in _several:
            return []
        with _noting:
            known = list(_several.get(self.id, ()))
        others = [other for other in known if other is not self and other in reserved_requests]
        return sorted(others, key=lambda other: other.time_start or 0.0)

    def revoked(self) -> Any:
        """Return whether the task is not to be executed; what it has done is undone all the same."""
        return False if self.request_dict.get(UNDOING) else super().revoked()

    def terminate(self, pool: Any, signal: Any = None) -> Any:
        """Kill the process that executes the task, unless it undoes what the task has done, or has gone on since."""
        for request in (self, *self._others()):
            if not request.request_dict.get(UNDOING) and request._gone_on() is None:
                super(DurableRequest, request).terminate(pool, signal)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Kill the process that executes the task, because the worker stops or has lost its broker.

        What the process has gone on with since has no message that could be delivered to somebody else: it is left
        alone while the worker lives, and given back when it stops.
        """
        if self._gone_on() is None:
            super().cancel(pool, signal, emit_retry)
        elif state.should_stop is not None or state.should_terminate is not None:
            pool.terminate_job(self.worker_pid, signals.signum(signal or TERM_SIGNAME))

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what remote control shows; of a process that has gone on by itself, what it is at."""
        shown: dict[str, Any] = super().info(safe)
        entry = self._gone_on()
        if entry is not None:
            shown.update(id=entry.task_id, name=entry.name, type=entry.name, args=[], kwargs={})
            shown["gone_on_from"] = self.id
        return shown

    def _gone_on(self) -> Entry | None:
        """Return what the process that was given this request is at by now, if that is something else."""
        board = self._ledger.board
        return board.entry(self.worker_pid) if board is not None and self.worker_pid else None

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A process of the pool has begun the task."""
        self._ledger.holdings.accept(id(self))
        super().on_accepted(pid, time_accepted)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The task ran out of time."""
        with nullcontext() if soft else self._leaving():
            super().on_timeout(soft, timeout)

    def on_retry(self, exc_info: Any) -> None:
        """The task will be retried; the ledger has the retry's message."""
        with self._leaving():
            super().on_retry(exc_info)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """The task failed, or the process that executed it is gone."""
        with self._leaving():
            return self._on_failure(exc_info, send_failed_event, return_ok)

    def _on_failure(self, exc_info: Any, send_failed_event: bool, return_ok: bool) -> Any:
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        announced = self._already_cancelled or self._already_revoked
        if isinstance(exc, Terminated) and self._gone_on() is not None:
            return self._finished()  # what was ended is what came after it
        gone = isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt)
        if gone and not announced and self.task.is_recorded(self.request_dict):
            return self._bereaved(exc)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _finished(self) -> None:
        """The task had been finished before its process ended."""
        task_ready(self)
        if self.task.acks_late:
            self.acknowledge()

    def _bereaved(self, exc: BaseException) -> None:
        """Make the step due at once and acknowledge: the relay sends it again, the ledger counts the loss.

        So it is where the process died with the message before it asked for the step: a message that no process
        survives would be sent for ever otherwise.

        Where the database does not answer, the lease runs out by itself.
        """
        task_ready(self)
        headers = self.request_dict
        generation = ids.generation(headers.get("replaced_task_nesting"), headers.get("retries"))

        def work(session: Session) -> bool:
            return bereave(session, self._ledger, self.id, pid=self.worker_pid, generation=generation)

        again = True
        try:
            again = self._ledger.call(work)
            fate = "the step is tried again" if again else "its step was finished, or is somebody else's"
            logger.warning("task %s[%s]: %s; %s", self.name, self.id, exc, fate)
        except StoreUnavailable as error:
            logger.warning("task %s[%s]: %s; tried again when its lease ends: %s", self.name, self.id, exc, error)
        if self.task.acks_late:
            self.acknowledge()
        if again:
            self.send_event("task-retried", exception=repr(exc), traceback="")

    def _announce_revoked(self, *args: Any, **kwargs: Any) -> None:
        with self._leaving():
            super()._announce_revoked(*args, **kwargs)

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        with self._leaving():
            super()._announce_cancelled(*args, **kwargs)


def route(delivery_info: Any) -> str:
    """Return the queue a message came from, as the ledger names it."""
    exchange, key = delivery_info.get("exchange"), delivery_info.get("routing_key")
    return f"{exchange}/{key}" if exchange else str(key)
