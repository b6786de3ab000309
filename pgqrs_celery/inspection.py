"""``celery inspect scheduled`` for ETAs that wait in the database instead of in a worker's memory.

Imported in worker processes only, where it takes the place of Celery's command of that name. Each worker answers with
what waits in the queues it consumes, so several workers of one queue list the same tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

from celery.worker.control import Panel
from celery.worker.request import Request

from pgqrs_celery.store import messages
from pgqrs_celery.transport import Transport
from pgqrs_celery.transport.message import Message

__all__ = ["scheduled"]

#: Tasks listed at most, those due first.
LIMIT: Final = 1000
#: The priority of Celery's own ETA timers, which its command reports.
TIMER_PRIORITY: Final = 6

_celery_s: Any = Panel.data["scheduled"]


def scheduled(state: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """List the ETA and countdown tasks that wait in this worker's queues."""
    found: list[dict[str, Any]] = _celery_s(state, **kwargs)
    transport = state.consumer.connection.transport
    if isinstance(transport, Transport):
        found += _waiting(state, transport, [queue.name for queue in state.consumer.task_consumer.queues])
    return found


def _waiting(state: Any, transport: Transport, queues: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in transport.broker.call(lambda session: messages.deferred(session, queues, limit=LIMIT)):
        message = Message(None, str(row.message_id), row.headers, row.properties, row.body)
        task = state.app.tasks.get(message.headers.get("task"))
        if task is not None:
            request = Request(message, app=state.app, hostname=state.hostname, task=task)
            eta = datetime.fromisoformat(message.headers["eta"]).isoformat()
            yield {"eta": eta, "priority": TIMER_PRIORITY, "request": request.info()}


for name in ("scheduled", "dump_schedule"):
    Panel.data[name] = scheduled
