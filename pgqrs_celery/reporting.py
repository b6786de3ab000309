"""Task events about what a process has gone on with by itself: its worker's main process, which sends all others, would
not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from celery import Celery, states
from celery.utils.saferepr import saferepr
from kombu.utils.encoding import safe_str

__all__ = ["begun"]


@contextmanager
def begun(app: Celery, request: Mapping[str, Any]) -> Iterator[Callable[[Any], None]]:
    """Report that a task was received and has begun; yields what takes the tracer's answer, and reports its end."""
    task_id = request["id"]
    # Events that cannot be sent are lost, as those of a main process are whose broker stays away: they stop no task.
    with app.events.default_dispatcher(hostname=request["hostname"], buffer_while_offline=True) as dispatcher:
        dispatcher.send(
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
        dispatcher.send("task-started", uuid=task_id)

        def ended(answer: Any) -> None:
            value, info, runtime, text = answer
            state = states.SUCCESS if info is None else info.state
            if state == states.SUCCESS:
                dispatcher.send("task-succeeded", uuid=task_id, result=text, runtime=runtime)
            elif state == states.RETRY:
                dispatcher.send(
                    "task-retried",
                    uuid=task_id,
                    exception=saferepr(info.retval.exc),
                    traceback=safe_str(getattr(value, "traceback", "")),
                )
            elif state == states.FAILURE:
                dispatcher.send(
                    "task-failed", uuid=task_id, exception=saferepr(info.retval), traceback=safe_str(value.traceback)
                )

        yield ended
