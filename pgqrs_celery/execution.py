"""What one execution of a durable task knows: its guard, how far it is, what it has sent.

It hangs on the task's request, so that the send seam and the gate find it while Celery's tracer goes on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

from celery._state import get_current_worker_task

from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.guard import StepGuard
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.store.chords import Chord
from pgqrs_celery.store.recording import NewStep

__all__ = ["ATTRIBUTE", "Deferred", "Execution", "Phase", "current", "of_request"]

logger = logging.getLogger(__name__)

ATTRIBUTE: Final = "_pgqrs_execution"


class Phase(Enum):
    """How far an execution is."""

    #: The user's code runs.
    BODY = auto()
    #: The body returned; Celery sends what follows, which is collected and committed together with the result.
    SUCCEEDED = auto()
    #: An earlier owner's error is raised again so that its consequences happen.
    FAILED_BEFORE = auto()
    #: The final error is committed; Celery sends what follows.
    FAILED = auto()
    #: The body asked for a retry, or was replaced: the id belongs to a newer message.
    SUPERSEDED = auto()
    #: Another owner has the step: nothing more is recorded, sent or stored.
    LOST = auto()


@dataclass(slots=True)
class Deferred:
    """Messages that wait for their sender's success to be committed, with their rows and the chords they head."""

    messages: list[Outgoing] = field(default_factory=list)
    rows: list[NewStep] = field(default_factory=list)
    chords: list[Chord] = field(default_factory=list)


class Execution:
    """One execution of one durable task."""

    __slots__ = (
        "deferred",
        "equal_sends",
        "give_up",
        "guard",
        "phase",
        "replaced_by",
        "request",
        "uncommitted",
        "value",
    )

    def __init__(self, guard: StepGuard, phase: Phase, request: Any) -> None:
        self.guard = guard
        self.request = request
        self.phase = phase
        #: The recorded result, once there is one.
        self.value: Any = None
        #: The result as JSON text, until it is committed.
        self.uncommitted: str | None = None
        #: What follows from the result: recorded in the transaction that commits it, and then sent.
        self.deferred = Deferred()
        #: The generation of the message that will take over the task's id, while it is being replaced.
        self.replaced_by: int | None = None
        self.equal_sends: Counter[str] = Counter()
        #: Called with an error that is final, before anything follows from it.
        self.give_up: Callable[[Exception], None] | None = None

    def settle(self) -> bool:
        """Commit the result if that is still to be done; False where another owner has the step.

        Everything that becomes visible outside this step's own transaction must be preceded by it.
        """
        if self.uncommitted is not None:
            text, self.uncommitted = self.uncommitted, None
            try:
                accepted = self.guard.succeed(text)
            except StoreUnavailable as error:
                logger.error("%s: its result cannot be recorded, it runs again: %s", self.guard, error)
                accepted = False
            if not accepted:
                self.lose()
        return self.phase is not Phase.LOST

    def lose(self) -> None:
        """Note that another owner has the step."""
        self.phase, self.uncommitted = Phase.LOST, None
        logger.warning("%s belongs to another worker by now: what was done here is not recorded", self.guard)

    def fail_for_good(self, error: Exception) -> None:
        """The body's error is final: what has been done is compensated, where the body knows how."""
        if self.give_up is not None:
            self.give_up(error)

    def nth(self, key: str) -> int:
        """Return how many equal sends came before this one."""
        self.equal_sends[key] += 1
        return self.equal_sends[key] - 1


def of_request(request: Any) -> Execution | None:
    """Return the execution a request belongs to."""
    return getattr(request, ATTRIBUTE, None) if request is not None else None


def current() -> Execution | None:
    """Return the execution of the durable task that the worker is executing in this thread, if any."""
    task = get_current_worker_task()
    return of_request(task.request) if task is not None else None
