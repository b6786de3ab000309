"""Local continuation: the process that has finished a link of a chain goes on with the next one itself.

A message between two links costs more than the link: it is inserted, claimed, given to a process of the pool, answered
and deleted, and its step is asked for. Where ``pgqrs_local_continuation`` allows it, the unit of work that ends a step
takes the next one in the same transaction, for the same process, and Celery's tracer is called again. For the ledger
nothing is new: a step that is RUNNING under a lease, which goes to a relay like any other when its process dies.

The worker's main process hears nothing of such a link. So what lives there must not concern it: no time limit, no rate
limit, no other queue, priority, expiry or ETA, and no task that was revoked. And a stretch ends after so many seconds:
then the next link goes through the queue, behind what has been waiting there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from celery.app.trace import trace_task
from kombu.serialization import loads, prepare_accept_content

from pgqrs_celery.envelope import SENT, Content
from pgqrs_celery.execution import Execution
from pgqrs_celery.guard import StepGuard, new_token
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.store.recording import NewStep, Recorded
from pgqrs_celery.store.units import Taking

__all__ = ["Candidate", "candidate", "going_on", "guard_of"]

#: Where a request that was not made of a message has its guard.
GUARD: Final = "_pgqrs_guard"

#: The exchanges by which a message gets to the queue its routing key names.
DEFAULT: Final = ("", None)


class Stretch(threading.local):
    """What this thread is at since it was given a message."""

    #: When it was given that; None outside of the tracer of a durable task.
    since: float | None = None
    following: Following | None = None


_stretch = Stretch()


@dataclass(frozen=True, slots=True)
class Following:
    """A step that was taken together with the end of the one before it."""

    task: Any
    guard: StepGuard
    request: dict[str, Any]
    content: Content

    def execute(self) -> None:
        """Let Celery's tracer execute the step."""
        content_type, encoding, data = self.content
        app = self.task.app
        accept = prepare_accept_content(app.conf.accept_content)
        args, kwargs, embed = loads(data, content_type, encoding, accept=accept)
        self.request.update(embed, args=args, kwargs=kwargs)
        trace_task(self.task, self.guard.task_id, args, kwargs, self.request, app=app)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What follows from a step that this process could go on with, and under what it would take it."""

    task: Any
    message: Outgoing
    step: NewStep
    taking: Taking
    before: Execution
    content: Content
    deadline: float

    def take(self, recorded: Recorded) -> None:
        """Note that the step is ours: it is executed when the tracer of the present one has ended."""
        before = self.before.guard
        guard = StepGuard.taken(before, self.step, self.taking, self.deadline, recorded.sent_at)
        _stretch.following = Following(self.task, guard, self._request(guard, recorded), self.content)

    def _request(self, guard: StepGuard, recorded: Recorded) -> dict[str, Any]:
        """Return the request as the worker's main process makes it of a message."""
        message, request = self.message, self.before.request
        properties = {**message.properties, "priority": message.options.get("priority") or 0}
        return {
            **message.headers,
            SENT: recorded.sent_at.isoformat(),
            "properties": properties,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id"),
            "hostname": request.hostname,
            "delivery_info": {**request.delivery_info, "redelivered": False},
            "is_eager": False,
            GUARD: guard,
        }


def going_on(tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Return the tracer of a durable task such that it goes on with what follows from the task."""

    def trace(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        if _stretch.since is not None:
            return tracer(uuid, args, kwargs, request)
        _stretch.since = time.monotonic()
        try:
            answer = tracer(uuid, args, kwargs, request)
            while _stretch.following is not None:
                following, _stretch.following = _stretch.following, None
                following.execute()
            return answer
        finally:
            _stretch.since = None

    return trace


def guard_of(request: Any) -> StepGuard | None:
    """Return, once, the guard of a step that was taken before its request was made."""
    guard: StepGuard | None = request.__dict__.pop(GUARD, None)
    return guard


def candidate(running: Execution, messages: list[Outgoing], rows: list[NewStep], app: Any) -> Candidate | None:
    """Return what this process can go on with when it has finished a step, or None."""
    ledger = running.guard.ledger
    limit = ledger.settings.local_continuation
    if not limit or _stretch.since is None or len(messages) != 1 or ledger.worker_id is None:
        return None
    message, step = messages[0], rows[0]
    task = app.tasks.get(message.name)
    began = time.monotonic()
    if began - _stretch.since >= limit or task is None or not _fits(task, message, step, running.request):
        return None
    serializer = message.options.get("serializer") or app.conf.task_serializer
    lease = ledger.settings.lease
    taking = Taking(new_token(), ledger.worker_id, lease)
    return Candidate(task, message, step, taking, running, message.content(serializer), began + lease)


def _fits(task: Any, message: Outgoing, step: NewStep, request: Any) -> bool:
    """Return whether nothing about a step is the business of the worker's main process."""
    options, headers, route = message.options, message.headers, request.delivery_info or {}
    queue = options.get("queue")
    return (
        not message.held
        and step.kind == "canvas"
        and not (headers.get("expires") or headers.get("eta") or any(headers.get("timelimit") or ()))
        and not (task.time_limit or task.soft_time_limit or task.rate_limit)
        and not options.get("exchange")
        and route.get("exchange") in DEFAULT
        and getattr(queue, "name", queue) == route.get("routing_key")
        and (options.get("priority") or 0) == (route.get("priority") or 0)
    )
