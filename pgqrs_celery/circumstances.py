"""Under which circumstances messages are being recorded in this thread: whose transaction, which workflow, where to."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from pgqrs_celery import outbox
from pgqrs_celery.drafting import RunSpec
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Session
from pgqrs_celery.store.messages import NewMessage, Published
from pgqrs_celery.store.recording import Recorded
from pgqrs_celery.store.runs import Run

__all__ = ["Box", "ExistingRun", "Target", "outer", "starting", "target"]


@dataclass(slots=True)
class Box:
    """Collects what is published to our own broker."""

    messages: list[NewMessage] = field(default_factory=list)

    def add_message(self, message: NewMessage, publisher: outbox.Publisher) -> None:
        """Take one message."""
        self.messages.append(message)


class ExistingRun(BaseException):
    """The workflow key belongs to a run already; nothing was recorded or sent."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.run = run


@dataclass(slots=True)
class Target:
    """A transaction of somebody else's that messages are recorded in; they are sent after its commit.

    Our own broker, where it is in the same database, gets them in that transaction; ``published`` is to be woken then.
    """

    session: Session
    workflow_id: int
    root_id: str
    messages: list[Outgoing] = field(default_factory=list)
    recorded: dict[str, Recorded] = field(default_factory=dict)
    published: list[Published] = field(default_factory=list)


#: Set while messages are to be recorded in a transaction that is open already.
target: ContextVar[Target | None] = ContextVar("pgqrs_target", default=None)

#: Set while messages are to be recorded in the user's own transaction; they are due when it commits.
outer: ContextVar[Session | None] = ContextVar("pgqrs_outer", default=None)

#: Set while a named workflow applies its canvas.
starting: ContextVar[RunSpec | None] = ContextVar("pgqrs_starting", default=None)
