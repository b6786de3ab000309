"""Local continuation: the process that has finished a link of a chain goes on with the next one itself.

A message between two links costs more than the link: it is published, received, given to a process of the pool and
acknowledged, and its step is asked for. Where ``pgqrs_local_continuation`` allows it, the process that ends a step has
the next one, too (``succession`` says how), and Celery's tracer is called again. For the ledger nothing is new: a step
that is RUNNING under a lease, and goes to a relay like any other when its process dies.

The worker's main process hears of such a link on the ``board`` only. So what lives there must not concern it: no time
limit, no rate limit, no other queue, priority, expiry or ETA; and nothing goes on while tasks are revoked or the worker
stops (``permission``). A stretch ends after so many seconds: then the next link goes through the queue, behind what has
been waiting there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import UUID

from billiard.process import current_process
from celery.app.trace import trace_task
from kombu.serialization import loads, prepare_accept_content

from pgqrs_celery.board import LONGEST, Place
from pgqrs_celery.envelope import SENT, Content
from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.execution import Execution
from pgqrs_celery.guard import StepGuard, new_token
from pgqrs_celery.leases import bereave
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.reporting import Reporter
from pgqrs_celery.session import Session
from pgqrs_celery.store.recording import NewStep, Recorded
from pgqrs_celery.store.units import Taking

__all__ = ["REQUEST", "Candidate", "candidate", "following_of", "going_on", "pass_on"]

logger = logging.getLogger(__name__)

#: How durable tasks name the class of their requests, which handles their messages in the worker's main process.
REQUEST: Final = "pgqrs_celery.request:DurableRequest"


@dataclass(frozen=True, slots=True)
class Following:
    """A step that this thread executes next: taken with the end of the one before it, or still to be asked for."""

    task: Any
    ledger: Ledger
    step: NewStep
    #: Under what it is asked for, if there is no guard yet.
    lease_token: UUID
    guard: StepGuard | None
    request: dict[str, Any]
    content: Content

    def execute(self) -> None:
        """Let Celery's tracer execute the step."""
        content_type, encoding, data = self.content
        app, task_id = self.task.app, self.step.task_id
        accept = prepare_accept_content(app.conf.accept_content)
        args, kwargs, embed = loads(data, content_type, encoding, accept=accept)
        self.request.update(embed, args=args, kwargs=kwargs)
        board = self.ledger.board
        reported = board is not None and board.reported and self.task.send_events
        reporter = _stretch.reporter_of(app, self.request["hostname"]) if reported else None
        if reporter is not None:
            reporter.begun(self.request)
        answer = trace_task(self.task, task_id, args, kwargs, self.request, app=app)
        if reporter is not None:
            reporter.ended(task_id, answer)

    def give_up(self, *, begun: bool) -> None:
        """This process ends in the step, or before it: it is tried again, as after any other death."""
        ledger, step = self.ledger, self.step

        def due(session: Session) -> bool:
            return bereave(session, ledger, step.task_id, pid=os.getpid(), generation=step.generation, counted=begun)

        try:
            ledger.call(due)
        except StoreUnavailable as error:
            logger.warning("step %r (task %s) is due when its lease ends: %s", step.step_id, step.task_id, error)


class Stretch(threading.local):
    """What this thread is at since it was given a message."""

    #: When it was given that; None outside of the tracer of a durable task.
    since: float | None = None
    #: What it is at, if that is not what it was given.
    present: Following | None = None
    #: What it takes next.
    following: Following | None = None
    #: Where it says so.
    place: Place | None = None
    #: Who tells of it, where somebody wants to know.
    reporter: Reporter | None = None

    def note(self, next_id: str = "") -> None:
        """Say on the board what this thread is at, and what it is about to take."""
        present = self.present
        if self.place is not None:
            self.place.write(present.step.task_id if present else "", present.task.name if present else "", next_id)

    def reporter_of(self, app: Any, hostname: str) -> Reporter:
        """Return who tells of what this thread is at."""
        if self.reporter is None or self.reporter.hostname != hostname:
            self.reporter = Reporter(app, hostname)
        return self.reporter

    def go_on(self) -> Following | None:
        """Go on with what was taken, if anything was."""
        self.present, self.following = self.following, None
        self.note()
        return self.present

    def end(self) -> None:
        """The thread is done with what it was given; what followed is left only where an exception ends it."""
        begun, following = self.present, self.following
        self.since = self.present = self.following = None
        self.note()
        if self.reporter is not None:
            self.reporter.flush()
        if begun is not None:
            begun.give_up(begun=True)
        if following is not None:
            following.give_up(begun=False)


_stretch = Stretch()


def going_on(tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Return the tracer of a durable task such that it goes on with what follows from the task."""

    def trace(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        if _stretch.since is not None:
            return tracer(uuid, args, kwargs, request)
        _stretch.since = time.monotonic()
        try:
            answer = tracer(uuid, args, kwargs, request)
            while (following := _stretch.go_on()) is not None:
                following.execute()
            return answer
        finally:
            _stretch.end()

    return trace


def following_of(request: Any) -> Following | None:
    """Return the step of a request where it was taken by, or handed to, this thread before its request was made."""
    present = _stretch.present
    return present if present is not None and present.step.task_id == request.id else None


def pass_on(finished_id: str, fence: int) -> bool | None:
    """End the hand-off of a step and take the next one that was handed to this thread.

    None where none was, and nothing was done; False where somebody else may have the next one. Raises
    ``StoreUnavailable``.
    """
    following = _stretch.following
    if following is None:
        return None
    guard = StepGuard.passed_on(following.ledger, finished_id, fence, following.step, following.lease_token)
    _stretch.following = replace(following, guard=guard)
    return guard is not None


@dataclass(frozen=True, slots=True)
class Candidate:
    """What follows from a step that this process could go on with."""

    task: Any
    message: Outgoing
    step: NewStep
    before: Execution

    def announce(self) -> None:
        """Say that the step may be ours from now on: nobody could tell whose it is if this process died then."""
        _stretch.note(self.step.task_id)

    def take(self, recorded: Recorded, taking: Taking, asked_at: float) -> None:
        """The step is ours, as asked for then: it is executed when the tracer of the present one has ended."""
        deadline = asked_at + taking.lease
        guard = StepGuard.taken(self.before.guard, self.step, taking, deadline, recorded.sent_at)
        self._follow(taking.lease_token, guard, recorded)

    def hand_over(self, recorded: Recorded) -> None:
        """The step is asked for, and executed if it is ours then, when the present one is handed off."""
        self._follow(new_token(), None, recorded)

    def _follow(self, lease_token: UUID, guard: StepGuard | None, recorded: Recorded) -> None:
        ledger, message = self.before.guard.ledger, self.message
        content = message.content(message.options.get("serializer") or self.task.app.conf.task_serializer)
        request = self._request(recorded)
        _stretch.following = Following(self.task, ledger, self.step, lease_token, guard, request, content)

    def leave(self) -> None:
        """The step is not ours."""
        _stretch.note()

    def _request(self, recorded: Recorded) -> dict[str, Any]:
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
        }


def candidate(running: Execution, message: Outgoing, step: NewStep, app: Any) -> Candidate | None:
    """Return what this process can go on with when it has finished a step, or None."""
    ledger, now = running.guard.ledger, time.monotonic()
    board = ledger.board
    if board is None or ledger.worker_id is None or _stretch.since is None or not board.permitted:
        return None
    task = app.tasks.get(message.name)
    if now - _stretch.since >= ledger.settings.local_continuation or not _fits(task, message, step, running.request):
        return None
    if _is_limited(running.request, app.tasks.get(running.request.task)):
        return None
    if _stretch.place is None:
        _stretch.place = board.place(getattr(current_process(), "index", -1))
        if _stretch.place is None:
            return None
    return Candidate(task, message, step, running)


def _is_limited(request: Any, task: Any) -> bool:
    """Return whether the main process limits the time of what it has given this process, and so of what follows."""
    return any(request.timelimit or ()) or task is None or bool(task.time_limit or task.soft_time_limit)


def _fits(task: Any, message: Outgoing, step: NewStep, request: Any) -> bool:
    """Return whether nothing about a step is the business of the worker's main process."""
    options, headers, route = message.options, message.headers, request.delivery_info or {}
    queue = options.get("queue")
    return (
        task is not None
        and step.kind == "canvas"
        and not message.held
        and len(step.task_id.encode()) <= LONGEST
        and not (headers.get("expires") or headers.get("eta") or any(headers.get("timelimit") or ()))
        and not headers.get("stamped_headers")  # by which tasks are revoked
        and not (task.time_limit or task.soft_time_limit or task.rate_limit)
        and task.Request == REQUEST  # one of the user's own is there for what the main process hears
        and not (options.get("exchange") or route.get("exchange"))
        and getattr(queue, "name", queue) == route.get("routing_key")
        and (options.get("priority") or 0) == (route.get("priority") or 0)
    )
