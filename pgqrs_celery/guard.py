"""StepGuard: the right to execute one step, and the only way to write its outcome."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pgqrs_celery.exceptions import LeaseLost
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.store import runs, steps
from pgqrs_celery.store.recording import NewStep
from pgqrs_celery.store.runs import NewRun
from pgqrs_celery.store.steps import Acquired, Verdict
from pgqrs_celery.store.units import Taking

__all__ = ["Adoption", "Decision", "StepGuard"]


@dataclass(frozen=True, slots=True)
class Adoption:
    """What to enter where a step has no row because it was sent without this package."""

    run: NewRun
    step: NewStep


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to ``StepGuard.acquire``.

    EXECUTE comes with a guard, and so does UNDO, with the error its step ends with. REPLAY comes with one, too: its
    step is finished, its hand-off is not. ``output`` and ``error`` are JSON text.
    """

    verdict: Verdict
    guard: StepGuard | None = None
    failed: bool = False
    output: str | None = None
    error: str | None = None


class StepGuard:
    """One owner's hold on one step: every write says ``AND lease_token = …`` and so only the present owner's count."""

    __slots__ = (
        "acquired_at",
        "attempt",
        "deadline",
        "fence",
        "generation",
        "lease_token",
        "ledger",
        "root_id",
        "step_id",
        "task_id",
        "workflow_id",
        "workflow_name",
    )

    def __init__(self, ledger: Ledger, task_id: str, lease_token: UUID, deadline: float, row: Acquired) -> None:
        self.ledger = ledger
        self.task_id = task_id
        self.lease_token = lease_token
        self.deadline = deadline
        self.workflow_id = row.workflow_id
        self.workflow_name = row.workflow_name
        self.root_id = row.root_id
        self.step_id = row.step_id
        self.acquired_at = row.now
        self.generation = row.generation
        self.fence = row.fence or 0
        self.attempt = row.attempt or 0

    @classmethod
    def acquire(
        cls,
        ledger: Ledger,
        task_id: str,
        *,
        generation: int = 0,
        adoption: Adoption | None = None,
        lease_token: UUID | None = None,
    ) -> Decision:
        """Ask for the right to execute a step, under a new token unless one was used for that before.

        Without ``adoption`` a missing row means that the step was recorded once and removed by retention: DONE.
        Raises ``StoreUnavailable`` where the database stays away longer than ``pgqrs_patience``.
        """
        lease_token = lease_token or new_token()
        settings = ledger.settings
        began = time.monotonic()

        def ask(session: Session) -> Acquired | None:
            nonlocal began
            began = time.monotonic()
            row = steps.acquire(
                session,
                task_id,
                generation=generation,
                lease_token=lease_token,
                worker_id=ledger.worker_id,
                lease=settings.lease,
                max_lost=settings.max_lost,
                poison=ledger.poison,
                may_judge=ledger.may_judge,
            )
            if row and row.touch and row.verdict == Verdict.EXECUTE:
                runs.touch(session, row.workflow_id)
            return row

        row = ledger.call(ask, patience=settings.patience)
        if row is None and adoption is not None:
            row = ledger.call(
                lambda session: _adopt(session, ledger, adoption, lease_token),
                patience=settings.patience,
                transaction=True,
            ) or ledger.call(ask, patience=settings.patience)
        while row is not None and row.verdict == Verdict.PAUSED and not _park(ledger, row.workflow_id, task_id):
            row = ledger.call(ask, patience=settings.patience)
        if row is None:
            return Decision(Verdict.DONE)
        verdict = Verdict(row.verdict)
        failed = row.status == "FAILED" or verdict is Verdict.POISONED
        if verdict is Verdict.POISONED:
            verdict = Verdict.REPLAY
        if verdict not in (Verdict.EXECUTE, Verdict.REPLAY, Verdict.UNDO):
            return Decision(verdict)
        guard = cls(ledger, task_id, lease_token, began + settings.lease, row)
        return Decision(verdict, guard, failed, row.output, row.error)

    @classmethod
    def passed_on(
        cls, ledger: Ledger, finished_id: str, fence: int, step: NewStep, lease_token: UUID
    ) -> StepGuard | None:
        """End the hand-off of a step and take the next one.

        None where that is not simply to be had: it is to be asked for with ``acquire``, under the same token.
        """
        lease, began = ledger.settings.lease, 0.0

        def ask(session: Session) -> Acquired | None:
            nonlocal began
            began = time.monotonic()
            return steps.pass_on(
                session,
                finished_id,
                fence=fence,
                task_id=step.task_id,
                generation=step.generation,
                lease_token=lease_token,
                worker_id=ledger.worker_id,
                lease=lease,
            )

        row = ledger.call(ask, patience=ledger.settings.patience)
        return None if row is None else cls(ledger, step.task_id, lease_token, began + lease, row)

    @classmethod
    def taken(cls, before: StepGuard, step: NewStep, taking: Taking, deadline: float, at: datetime) -> StepGuard:
        """Return the guard of a step that was taken in the transaction that finished the one ``before`` it."""
        row = _first(step, before.workflow_id, before.workflow_name, before.root_id, at)
        return cls(before.ledger, step.task_id, taking.lease_token, deadline, row)

    def database_time(self) -> datetime:
        """Return the database's time as far as this process can know it: that of the acquire, plus what has passed."""
        elapsed = time.monotonic() - (self.deadline - self.ledger.settings.lease)
        return self.acquired_at + timedelta(seconds=elapsed)

    def check_deadline(self) -> None:
        """Raise ``LeaseLost`` if this process stalled for a whole lease since it asked: somebody else may have begun.

        Looks at the local monotonic clock only; narrows a window that no ledger can close.
        """
        if time.monotonic() >= self.deadline:
            raise LeaseLost(f"{self}: stalled longer than its lease")

    def __str__(self) -> str:
        return f"step {self.step_id!r} of run {self.workflow_id} ({self.workflow_name})"

    def success(self, value: Any) -> Any:
        """Commit the step's result and return it as a replay would see it.

        Raises ``LeaseLost`` where another owner has the step, ``ResultNotSerializable`` or ``ResultTooLarge`` where
        the value cannot be recorded.
        """
        values = self.ledger.values
        text = values.dump_result(value, self.step_id)
        if not self.succeed(text):
            raise LeaseLost(f"{self}: finished by or given to another worker")
        return values.load(text)

    def succeed(self, output: str) -> bool:
        """Commit the step's result (JSON text); False where another owner has the step."""
        settings = self.ledger.settings
        return self.ledger.call(
            lambda session: steps.succeed(session, self.task_id, lease_token=self.lease_token, output=output),
            patience=max(settings.patience, settings.lease),
        )

    def fail(self, error: str) -> bool:
        """Commit the step's final error (JSON text); False where another owner has the step."""
        fence = self.ledger.call(
            lambda session: steps.fail(
                session, self.task_id, error=error, lease=self.ledger.settings.lease, lease_token=self.lease_token
            ),
            patience=self.ledger.settings.patience,
        )
        return fence is not None

    def give_back(self) -> bool:
        """Queue the step again, due at once, and call a relay; False where another owner has it."""

        def work(session: Session) -> bool:
            given = steps.give_back(session, self.task_id, lease_token=self.lease_token)
            runs.notify(session, self.ledger.channel)
            return given

        return self.ledger.call(work, patience=self.ledger.settings.patience)

    def drop(self, error: str) -> int | None:
        """Cancel the step because its body asked to be ignored; returns its run where it was ours to cancel."""
        return self.ledger.call(
            lambda session: steps.drop(session, self.task_id, lease_token=self.lease_token, error=error),
            patience=self.ledger.settings.patience,
        )


def new_token() -> UUID:
    """Return a new lease token: random, but for its last 32 bits, which are the id of this process.

    By them a worker's main process knows which of its processes has a step: one that dies takes nothing away from
    another that has it by now (``store.steps.bereave``).
    """
    return UUID(bytes=os.urandom(12) + os.getpid().to_bytes(4, "big"))


def _park(ledger: Ledger, workflow_id: int, task_id: str) -> bool:
    """Park a step whose run seemed to be paused; False where the run has gone on meanwhile."""
    return ledger.call(
        lambda session: runs.park(session, workflow_id, task_id), patience=ledger.settings.patience, transaction=True
    )


def _adopt(session: Session, ledger: Ledger, adoption: Adoption, lease_token: UUID) -> Acquired | None:
    """Enter and acquire a step in one transaction that is on disk before the body begins; None if it exists by now."""
    workflow_id, _ = runs.join(session, adoption.run, [])
    entered = steps.adopt(
        session,
        adoption.step,
        workflow_id=workflow_id,
        app=ledger.app,
        lease_token=lease_token,
        worker_id=ledger.worker_id,
        lease=ledger.settings.lease,
    )
    if not entered:
        return None
    runs.begin(session, workflow_id)
    return _first(adoption.step, workflow_id, adoption.run.name, adoption.run.root_id, datetime.now(UTC))


def _first(step: NewStep, workflow_id: int, workflow_name: str, root_id: str, now: datetime) -> Acquired:
    """Return what ``acquire`` would answer about a step that was entered as running here."""
    return Acquired(
        verdict=Verdict.EXECUTE,
        workflow_id=workflow_id,
        step_id=step.step_id,
        status="RUNNING",
        output=None,
        error=None,
        workflow_name=workflow_name,
        root_id=root_id,
        touch=False,
        generation=step.generation,
        fence=1,
        attempt=1,
        lost=0,
        now=now,
    )
