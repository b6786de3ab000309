"""Task events about what a process has gone on with by itself: its worker's main process, which sends all others, would
not know.

Between two links are three events (the end of the one, the arrival and the beginning of the other), which are one
message, as those are that a main process sends at about the same time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from celery import Celery, states
from celery.utils.saferepr import saferepr
from kombu.utils.encoding import safe_str

from pgqrs_celery.connecting import broker_errors, connect_once
from pgqrs_celery.exceptions import StoreError

__all__ = ["Reporter"]

logger = logging.getLogger(__name__)

#: Seconds for which nothing is sent after the broker did not take something: each try may take as long.
PAUSE: Final = 10.0


class Reporter:
    """Sends the events of one thread, over a connection of that thread's.

    What cannot be sent stops no task: it is lost, as the events of a main process are whose broker stays away, and for
    a while nothing more is tried.
    """

    def __init__(self, app: Celery, hostname: str) -> None:
        self.hostname = hostname
        self._app = app
        #: Until when nothing is sent (of the monotonic clock).
        self._silent_until = 0.0
        self._connect()

    def _connect(self) -> None:
        self._connection = connect_once(self._app)
        self._dispatcher: Any = self._app.events.Dispatcher(
            self._connection, self.hostname, buffer_while_offline=False, buffer_group=["task"], buffer_limit=1000
        )

    def begun(self, request: Mapping[str, Any]) -> None:
        """Report that a task was received and has begun, and what has waited for that."""
        if self._is_silent:
            return
        task_id = request["id"]
        self._dispatcher.send(
            "task-received",
            uuid=task_id,
            name=request["task"],
            args=request.get("argsrepr", ""),
            kwargs=request.get("kwargsrepr", ""),
            root_id=request.get("root_id"),
            parent_id=request.get("parent_id"),
            retries=request.get("retries", 0),
            eta=None,
            expires=None,
        )
        self._dispatcher.send("task-started", uuid=task_id)
        self.flush()

    def ended(self, task_id: str, answer: Any) -> None:
        """Report how a task has ended, by the tracer's answer: with the next one's beginning, or in ``flush``."""
        if self._is_silent:
            return
        value, info, runtime, text = answer
        state = states.SUCCESS if info is None else info.state
        if state == states.SUCCESS:
            self._dispatcher.send("task-succeeded", uuid=task_id, result=text, runtime=runtime)
        elif state == states.RETRY:
            exception, traceback = saferepr(info.retval.exc), safe_str(getattr(value, "traceback", ""))
            self._dispatcher.send("task-retried", uuid=task_id, exception=exception, traceback=traceback)
        elif state == states.FAILURE:
            exception, traceback = saferepr(info.retval), safe_str(value.traceback)
            self._dispatcher.send("task-failed", uuid=task_id, exception=exception, traceback=traceback)

    def flush(self) -> None:
        """Send what waits."""
        if self._is_silent:
            return
        away: tuple[type[BaseException], ...] = (StoreError, *broker_errors(self._dispatcher.producer))
        try:
            self._dispatcher.flush()
        except away as error:
            logger.warning("the broker does not take task events: %s", error)
            self._connection.release()
            self._silent_until = time.monotonic() + PAUSE
            self._connect()

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until
