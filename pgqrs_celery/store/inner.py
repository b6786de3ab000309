"""Inner steps: what a function has called and waited for, rows of its run without a message of their own.

Every write is fenced by the lease of the function's own row: of two processes that execute one function, only the
present owner's count. The rows are never due and never keep a run open; the function's row does both for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import NamedTuple

from psycopg.errors import UniqueViolation

from pgqrs_celery.session import Session
from pgqrs_celery.states import OPEN, Status

__all__ = ["Child", "ChildRun", "Inner", "Owner", "Wait", "Waited", "load", "record", "sleep", "wake_waiter"]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who executes a function: everything that a fenced write needs; the token as text, as each write sends it."""

    workflow_id: int
    app: str
    task_id: str
    lease_token: str
    generation: int

    def params(self) -> dict[str, object]:
        """Return the owner as the parameters of a statement."""
        return {"task_id": self.task_id, "lease_token": self.lease_token}


@dataclass(frozen=True, slots=True)
class Inner:
    """What is recorded of one call; ``generation`` is the function's when it was, ``task_id`` a task sent by it."""

    step_id: str
    status: str
    generation: int
    task_id: str | None
    output: str | None
    error: str | None
    input_hash: str | None

    @property
    def is_undone(self) -> bool:
        """Whether the call has succeeded and was compensated."""
        return self.status == Status.CANCELLED and self.output is not None


class NewInner(NamedTuple):
    """The outcome of a call; the payloads are JSON text, ``elapsed`` is in seconds.

    One is made at every step: a tuple, as that takes a third of the time.
    """

    step_id: str
    name: str
    status: str
    output: str | None
    error: str | None
    input_hash: str | None
    elapsed: float


class Waited(Enum):
    """What came of a wait."""

    #: It is over; how it ended is recorded.
    DECIDED = auto()
    #: The function is asleep.
    PARKED = auto()
    #: Not over, and whoever waits stays awake.
    AWAKE = auto()
    #: The function belongs to another owner.
    LOST = auto()


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait as it stands; ``seconds_left`` is None where it may last for ever."""

    waited: Waited
    output: str | None = None
    error: str | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """A task that a function has sent."""

    task_id: str
    step_id: str
    status: str
    output: str | None
    error: str | None

    @property
    def is_undone(self) -> bool:
        """Whether the task has succeeded and was compensated."""
        return self.status == Status.CANCELLED and self.output is not None


@dataclass(frozen=True, slots=True)
class ChildRun:
    """A run that a function has started."""

    root_id: str
    workflow_id: int
    status: str


def load(session: Session, workflow_id: int, prefix: str) -> list[Inner]:
    """Return everything recorded of the calls whose step ids begin with the prefix.

    To be called in a statement of its own after the acquire: the acquire's snapshot may be older than the former
    owner's last commit.
    """
    return session.many(Inner, "inner.load", {"workflow_id": workflow_id, "prefix": prefix})


def find(session: Session, workflow_id: int, step_id: str) -> Inner | None:
    """Return what is recorded under a step id."""
    return session.one(Inner, "inner.find", {"workflow_id": workflow_id, "step_id": step_id})


def record(session: Session, owner: Owner, new: NewInner, *, again: bool = False) -> bool:
    """Enter the outcome of a call; False where the owner is another one, or the call has succeeded before.

    ``again`` says that something may be recorded of it, or that this is part of a transaction; without it, that costs
    a second statement.
    """
    params = {
        "task_id": owner.task_id,
        "lease_token": owner.lease_token,
        "step_id": new.step_id,
        "name": new.name,
        "status": new.status,
        "output": new.output,
        "error": new.error,
        "input_hash": new.input_hash,
        "elapsed": f"{new.elapsed:.6f}",
    }
    if not again:
        try:
            return bool(session.quickly("inner.record", params))
        except UniqueViolation:
            pass  # recorded before: by an earlier attempt of this call, or by this very statement, its answer lost
    return bool(session.run("inner.record_again", params))


def can_undo(session: Session, owner: Owner) -> None:
    """Note that a function does what can be undone: from now on it does not end without having undone it."""
    session.run("inner.can_undo", owner.params())


def undo(session: Session, owner: Owner, step_id: str) -> bool:
    """Note that the effect of a call has been compensated; False where the owner is another one."""
    return bool(session.run("inner.undo", {**owner.params(), "step_id": step_id}))


def owns(session: Session, owner: Owner) -> bool:
    """Return whether the function is still the owner's."""
    return session.row("inner.owns", owner.params()) is not None


def sleep(
    session: Session,
    owner: Owner,
    step_id: str,
    *,
    seconds: float | None = None,
    until: datetime | None = None,
    park: bool,
) -> Wait:
    """Sleep until a deadline that is fixed the first time; in the caller's transaction."""
    if session.row("inner.own", owner.params()) is None:
        return Wait(Waited.LOST)
    entered = enter_wait(session, owner, step_id, "sleep", seconds=seconds, until=until)
    if entered.waited is Waited.DECIDED:
        return entered
    if entered.seconds_left is not None and entered.seconds_left <= 0:
        decide(session, owner, step_id, output="null")
        return Wait(Waited.DECIDED, output="null")
    return park_or_not(session, owner, step_id, entered, park=park)


def enter_wait(
    session: Session,
    owner: Owner,
    step_id: str,
    name: str,
    *,
    seconds: float | None,
    until: datetime | None = None,
) -> Wait:
    """Enter a wait of a locked function, or find it as it was entered before."""
    row = session.row(
        "inner.wait",
        {
            "workflow_id": owner.workflow_id,
            "app": owner.app,
            "step_id": step_id,
            "name": name,
            "generation": owner.generation,
            "seconds": seconds,
            "until": until,
        },
    )
    if row is None:
        return Wait(Waited.LOST)
    status, output, error, over, seconds_left = row
    if status == "SUCCESS":
        return Wait(Waited.DECIDED, output, error)
    return Wait(Waited.AWAKE, seconds_left=0.0 if over else seconds_left)


def decide(
    session: Session, owner: Owner, step_id: str, *, output: str | None = None, error: str | None = None
) -> None:
    """Record how a wait ended, in the transaction that has decided it."""
    session.run(
        "inner.decide",
        {"workflow_id": owner.workflow_id, "step_id": step_id, "output": output, "error": error},
    )


def park_or_not(session: Session, owner: Owner, step_id: str, entered: Wait, *, park: bool) -> Wait:
    """Put a locked function to sleep, or leave it awake where its process is to wait."""
    if not park:
        return entered
    parked = session.run("inner.park", {**owner.params(), "step_id": step_id, "awaits": None})
    return Wait(Waited.PARKED if parked else Waited.LOST)


def children(session: Session, task_ids: Sequence[str]) -> list[Child]:
    """Return how tasks stand that a function has sent."""
    return session.many(Child, "inner.tasks", {"task_ids": list(task_ids)})


def child_runs(session: Session, root_ids: Sequence[str]) -> list[ChildRun]:
    """Return how runs stand that a function has started."""
    return session.many(ChildRun, "inner.runs", {"root_ids": list(root_ids)})


def children_again(session: Session, workflow_id: int, failed: Sequence[Child]) -> None:
    """Queue failed tasks of a function again, in the caller's transaction; they are due at once.

    What has failed in them, or was undone, is executed again, too.
    """
    for child in failed:
        again(session, workflow_id, f"{child.step_id}/")
        session.run(
            "inner.tasks_again",
            {"workflow_id": workflow_id, "task_id": child.task_id, "prefix": f"{child.step_id}/"},
        )


def again(session: Session, workflow_id: int, prefix: str) -> list[tuple[str, str]]:
    """Let calls below a prefix that failed, or were undone, be made again, in the caller's transaction.

    Returns the ids and names of tasks that are not recorded any more, because they will be sent again.
    """
    params = {"workflow_id": workflow_id, "prefix": prefix}
    gone = session.rows("inner.forget_undone", params)
    session.run("inner.calls_again", params)
    return [(row[0], row[1]) for row in gone if row[0] is not None]


def await_children(
    session: Session, owner: Owner, *, task_ids: Sequence[str] = (), root_ids: Sequence[str] = (), park: bool
) -> Waited:
    """Wait until tasks and runs have ended; in the caller's transaction.

    First the function is locked, then, in the next statements, its children are looked at: whoever ends after that
    look finds the function parked, or waits for its lock.
    """
    if session.row("inner.own", owner.params()) is None:
        return Waited.LOST
    statuses = [child.status for child in children(session, task_ids)] if task_ids else []
    if root_ids:
        statuses += [run.status for run in child_runs(session, root_ids)]
    if not any(status in OPEN for status in statuses):
        return Waited.DECIDED
    if not park:
        return Waited.AWAKE
    awaits = [*task_ids, *(f"run:{root_id}" for root_id in root_ids)]
    parked = session.run("inner.park", {**owner.params(), "step_id": "", "awaits": awaits})
    return Waited.PARKED if parked else Waited.LOST


def wake_waiter(session: Session, task_id: str) -> bool:
    """Queue a function again if nothing it waits for is unfinished; in a transaction, after the end of a child.

    The look is a statement of its own after the lock: of two children that end at the same time, at least the one
    that comes second sees both.
    """
    session.row("inner.lock_waiter", {"task_id": task_id})
    return bool(session.run("inner.wake_waiter", {"task_id": task_id}))
