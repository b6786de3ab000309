"""Remote control of what a process has gone on with by itself: ``revoke``, ``terminate`` and ``query_task``.

Celery's own commands look for the task among the requests of the worker's main process, where such a step is not. So
where local continuation is on they are followed by a look at the board.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

from billiard.common import TERM_SIGNAME
from celery.platforms import signals
from celery.worker.control import Panel
from celery.worker.state import active_requests
from kombu.utils.functional import maybe_list

from pgqrs_celery.board import Board, Entry
from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.gate import revocation
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.store import runs, steps

__all__ = ["RemoteControl"]

logger = logging.getLogger(__name__)

#: Greater than the generation of any message.
ANY: Final = 2**62


class RemoteControl:
    """The commands of one worker."""

    def __init__(self, worker: Any, ledger: Ledger, board: Board) -> None:
        self.worker = worker
        self.ledger = ledger
        self.board = board
        self._before: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Let Celery's commands be followed by ours, until ``uninstall``; a process has one worker at a time."""
        commands: dict[str, Callable[..., Any]] = Panel.data
        self._before = {name: commands[name] for name in ("revoke", "terminate", "query_task")}
        revoke, terminate, query = self._before.values()

        def revoke_too(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
            answer = revoke(state, task_id, terminate=terminate, signal=signal, **options)
            if terminate:
                self.end(maybe_list(task_id) or (), signal)
            return answer

        def terminate_too(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
            answer = terminate(state, signal, task_id, **options)
            self.end(maybe_list(task_id) or (), signal)
            return answer

        def query_too(state: Any, ids: Any, **options: Any) -> Any:
            return {**query(state, ids, **options), **self.shown(maybe_list(ids) or ())}

        commands.update(revoke=revoke_too, terminate=terminate_too, query_task=query_too)

    def uninstall(self) -> None:
        """Leave Celery's commands as they were."""
        Panel.data.update(self._before)

    def shown(self, task_ids: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return how remote control shows the tasks among these that processes have gone on with."""
        wanted, found = set(task_ids), {}
        for request in list(active_requests):
            entry = self.board.entry(request.worker_pid)
            if entry is not None and entry.task_id in wanted:
                found[entry.task_id] = ("active", request.info())
        return found

    def end(self, task_ids: Iterable[str], signal: Any) -> None:
        """Cancel the steps among these that processes have gone on with, and end these processes."""
        wanted = set(task_ids)
        for entry in self.board.entries():
            if entry.task_id in wanted and entry.pid != os.getpid():  # threads cannot be ended by force
                self._end(entry, signals.signum(signal or TERM_SIGNAME))
            elif entry.next_id in wanted:
                self._cancel(entry.next_id)

    def _end(self, entry: Entry, signum: int) -> None:
        if not self._cancel(entry.task_id):
            return
        logger.info("terminating task %s[%s], which process %d has gone on with", entry.name, entry.task_id, entry.pid)
        self.worker.pool.terminate_job(entry.pid, signum)

    def _cancel(self, task_id: str) -> bool:
        """Cancel a step; False where the ledger cannot be told."""
        ledger, worker_id = self.ledger, self.ledger.worker_id

        def cancel(session: Session) -> None:
            # Due at once: a relay announces it to everybody who would have followed.
            steps.revoke(session, task_id, error=revocation("terminated"), lease=0, generation=ANY, worker_id=worker_id)
            runs.notify(session, ledger.channel)

        try:
            ledger.call(cancel)
        except StoreUnavailable as error:
            logger.warning("task %s is not terminated, the ledger cannot be told: %s", task_id, error)
            return False
        return True
