"""Local continuation, as the worker's main process sees it: whether its processes may, and what dead ones had.

What a process goes on with by itself cannot be revoked, held back or moved by this process. So nothing goes on while
anything of that kind is wanted of the worker.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery.worker import state

from pgqrs_celery.board import Board, Entry
from pgqrs_celery.durability import is_durable
from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.leases import bereave
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.store import steps

__all__ = ["Permission"]

logger = logging.getLogger(__name__)


class Permission:
    """Looks after the board of one worker; used by its event loop only."""

    def __init__(self, worker: Any, ledger: Ledger, board: Board) -> None:
        self.worker = worker
        self.ledger = ledger
        self.board = board
        #: Why nothing goes on, of what changes seldom.
        self._hindrance: str | None = "the worker is starting"
        self._said: str | None = self._hindrance
        self._queues = set(worker.app.amqp.queues.consume_from)
        self._limits = self._limits_now()

    def tick(self) -> None:
        """Say whether processes may go on: at every turn of the event loop."""
        reason = self._hindrance or passing_hindrance()
        if reason == self._said:
            return
        self._said = reason
        self.board.permitted = reason is None
        logger.info("local continuation is %s", "on" if reason is None else f"off: {reason}")

    def look(self) -> None:
        """Look for what changes seldom, and for processes that have died."""
        state.revoked.purge()  # else it is when the next task is revoked that the oldest are forgotten
        self._hindrance = self._seldom_hindrance()
        dispatcher = getattr(self.worker.consumer, "event_dispatcher", None)
        self.board.reported = dispatcher is not None and dispatcher.enabled
        self.tick()
        self._bereave()

    def withdraw(self) -> None:
        """Let nothing go on any more: the worker stops."""
        self._hindrance = "the worker stops"
        self.tick()

    def _seldom_hindrance(self) -> str | None:
        worker = self.worker
        if worker.time_limit or worker.soft_time_limit:
            return "the worker has a time limit"
        if worker.max_tasks_per_child:
            return "processes are replaced after some tasks"
        if not self._queues <= set(worker.app.amqp.queues.consume_from):
            return "a queue is not consumed from any more"
        if not self._limits.items() <= self._limits_now().items():
            return "limits of a task were changed"
        return None

    def _limits_now(self) -> dict[str, tuple[Any, ...]]:
        """Return the limits of all durable tasks, which remote control can change."""
        app = self.worker.app
        return {
            name: (task.rate_limit, task.time_limit, task.soft_time_limit)
            for name, task in app.tasks.items()
            if is_durable(app, name)
        }

    def _bereave(self) -> None:
        """Make due what processes had gone on with that have died."""
        pool = getattr(self.worker.pool, "_pool", None)
        processes = getattr(pool, "_pool", None)
        if processes is None:
            return
        alive = {process.pid for process in processes}
        for entry in self.board.entries():
            if entry.pid in alive:
                continue
            try:
                self.ledger.call(partial(self._make_due, entry))
            except StoreUnavailable as error:
                logger.warning("what process %d had is due when its leases end: %s", entry.pid, error)
            self.board.forget(entry.pid)

    def _make_due(self, entry: Entry, session: Session) -> None:
        for task_id in entry.task_ids:
            found = steps.peek(session, task_id)
            # Handed to the process, which had not asked for it yet.
            generation = found.generation if found is not None and found.status == "QUEUED" else None
            bereave(session, self.ledger, task_id, pid=entry.pid, generation=generation, counted=generation is None)
        logger.warning("process %d is gone; what it had gone on with is tried again: %s", entry.pid, entry.task_ids)


def passing_hindrance() -> str | None:
    """Return why nothing goes on, of what may change at any moment."""
    if state.should_stop is not None or state.should_terminate is not None:
        return "the worker stops"
    if state.revoked or state.revoked_stamps:
        return "tasks are revoked"
    return None
