"""The transition table in plain Python: what every statement of the ledger is to do with a run and its steps.

Times are seconds on the clock the test moves. A method takes what its statement takes, changes the model, and returns
what the statement is to answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from tests.support.ledger import INTERVAL, INTERVAL_MAX, LEASE, Row

OPEN_RUN = ("QUEUED", "RUNNING")


@dataclass(slots=True)
class Step:
    """One step as the table has it."""

    status: str = "QUEUED"
    open: bool = True
    generation: int = 0
    attempt: int = 0
    lost: int = 0
    handoffs: int = 0
    looks: int = 0
    fence: int = 0
    token: UUID | None = None
    worker: UUID | None = None
    due: float | None = None
    has_message: bool = True
    sent: bool = False
    has_output: bool = False
    has_error: bool = False

    @property
    def unfinished(self) -> bool:
        return self.status in ("QUEUED", "RUNNING", "PAUSED")

    def queue(self, due: float | None, **changes: Any) -> None:
        """Become QUEUED without an owner."""
        self.status, self.due, self.token, self.worker = "QUEUED", due, None, None
        for name, value in changes.items():
            setattr(self, name, value)

    def owned(self, token: UUID) -> bool:
        return self.token == token


@dataclass(slots=True)
class Model:
    """One run with its steps."""

    status: str = "QUEUED"
    paused: bool = False
    now: float = 0.0
    max_lost: int = 2
    steps: dict[str, Step] = field(default_factory=dict)

    def expected(self, task_id: str) -> Row:
        """The row a step is to have; contents of payloads and the tokens of nobody do not matter."""
        s = self.steps[task_id]
        due = None if s.due is None else s.due - self.now
        return Row(
            s.status, s.open, s.generation, s.attempt, s.lost, s.handoffs, s.looks, s.fence, s.token, s.worker, due,
            "message" if s.has_message else None, s.sent, "output" if s.has_output else None,
            "error" if s.has_error else None,
        )  # fmt: skip

    # --- record

    def record(
        self,
        task_id: str,
        *,
        generation: int = 0,
        delay: float | None = None,
        token: UUID | None = None,
        finished: str | None = None,
        hand_off: bool = False,
    ) -> str:
        if finished is not None and not self._finish(finished, token, hand_off):
            return "LOST"
        if self.status == "CANCELLED":
            return "CANCELLED"
        sent, due = delay is None, self.now + (INTERVAL if delay is None else delay)
        s = self.steps.get(task_id)
        if s is None:
            self.steps[task_id] = Step(generation=generation, due=due, sent=sent)
            return "SEND"
        mine = s.status == "QUEUED" or (s.status == "RUNNING" and token is not None and s.owned(token))
        awaited = s.status == "QUEUED" and not s.has_message and s.due is None
        if mine and (s.generation < generation or (s.generation == generation and awaited)):
            s.queue(due, generation=generation, sent=sent, looks=0, has_message=True)
            return "SEND"
        return "SUPPRESS"

    def go_on(self, finished: str, task_id: str, token: UUID, taken_as: UUID, worker: UUID) -> str:
        """A success with what follows from it, which its owner takes himself; TAKEN where that is so."""
        if not self._finish(finished, token, True):
            return "LOST"
        if self.status == "CANCELLED":
            return "CANCELLED"
        s = self.steps.get(task_id)
        if s is not None:
            if s.status != "QUEUED" or s.generation or s.has_message or s.due is not None:
                return "SUPPRESS"
            s.queue(self.now, sent=False, looks=0, has_message=True)
            return "SEND"
        if self.status != "RUNNING" or self.paused:
            self.steps[task_id] = Step(due=self.now)
            return "SEND"
        self.steps[task_id] = Step(
            "RUNNING", attempt=1, fence=1, token=taken_as, worker=worker, due=self.now + LEASE, sent=True
        )
        return "TAKEN"

    def begin(self) -> None:
        """A step of the run has begun."""
        if self.status == "QUEUED":
            self.status = "RUNNING"

    def _finish(self, task_id: str, token: UUID | None, hand_off: bool) -> bool:
        s = self.steps[task_id]
        if token is None or not s.owned(token) or s.status not in ("RUNNING", "QUEUED"):
            return False
        s.status, s.has_output, s.has_error = "SUCCESS", True, False
        if hand_off:
            s.open, s.due, s.has_message = False, None, False
        return True

    def await_replacement(self, task_id: str, token: UUID, generation: int) -> bool:
        s = self.steps[task_id]
        if s.status != "RUNNING" or not s.owned(token):
            return False
        s.queue(None, generation=generation, has_message=False, sent=False)
        return True

    # --- acquire

    def acquire(self, task_id: str, generation: int, token: UUID, worker: UUID, may_judge: bool) -> str:
        s = self.steps[task_id]
        verdict = self._verdict(s, generation, token, may_judge)
        if verdict in ("EXECUTE", "REPLAY", "POISONED", "CANCELLED"):
            again = s.token == token
            if s.status == "RUNNING" and verdict in ("EXECUTE", "POISONED") and not again:
                s.lost += 1
            if verdict == "EXECUTE":
                s.status, s.generation = "RUNNING", generation
                s.fence += 1
                s.attempt += not again
            elif verdict == "POISONED":
                s.status, s.has_error = "FAILED", True
            elif verdict == "CANCELLED":
                s.status = "CANCELLED"
            s.token = None if verdict == "CANCELLED" else token
            s.worker = s.worker if verdict == "REPLAY" else worker
            s.due = self.now + LEASE
        return verdict

    def _verdict(self, s: Step, generation: int, token: UUID, may_judge: bool) -> str:
        expired = s.due is not None and s.due <= self.now
        if s.status in ("SUCCESS", "FAILED") and s.open:
            return "REPLAY" if s.token in (None, token) or expired else "HELD"
        if s.status == "CANCELLED" and s.open:
            return "CANCELLED"
        if s.status not in ("QUEUED", "RUNNING"):
            return "DONE"
        if s.generation > generation:
            return "STALE"
        if self.status == "CANCELLED":
            return "CANCELLED"
        if self.paused and s.status == "QUEUED":
            return "PAUSED"
        if s.status == "QUEUED" or s.token == token:
            return "EXECUTE"
        if not expired or not may_judge:
            return "HELD"
        return "POISONED" if s.lost + 1 >= self.max_lost else "EXECUTE"

    def park(self, task_id: str) -> bool:
        if not self.paused:
            return False
        s = self.steps[task_id]
        if s.status == "QUEUED":
            s.queue(None)
        return True

    # --- outcomes

    def succeed(self, task_id: str, token: UUID) -> bool:
        s = self.steps[task_id]
        return self._finish(task_id, token, False) or (s.status == "SUCCESS" and s.owned(token))

    def fail(self, task_id: str, token: UUID) -> bool:
        s = self.steps[task_id]
        if s.owned(token) and s.status in ("RUNNING", "QUEUED"):
            s.status, s.has_error, s.due = "FAILED", True, self.now + LEASE
            return True
        return s.status == "FAILED" and s.owned(token)

    def give_back(self, task_id: str, token: UUID) -> bool:
        s = self.steps[task_id]
        if s.status != "RUNNING" or not s.owned(token):
            return False
        s.queue(self.now, sent=False)
        return True

    def drop(self, task_id: str, token: UUID) -> bool:
        s = self.steps[task_id]
        if s.status != "RUNNING" or not s.owned(token):
            return False
        s.status, s.open, s.due, s.has_message, s.has_error = "CANCELLED", False, None, False, True
        return True

    def hand_off(self, task_id: str, fence: int) -> bool:
        s = self.steps[task_id]
        if not s.open or s.unfinished or s.fence != fence:
            return False
        s.open, s.due = False, None
        if s.status == "SUCCESS":
            s.has_message = s.has_error = False
        return True

    # --- relay, leases, dead workers

    def claim(self, may_judge: bool) -> list[tuple[str, str, str]]:
        """(task id, status found, status now) of everything that is due."""
        claimed = []
        for task_id, s in self.steps.items():
            if s.due is None or s.due > self.now or (s.status == "RUNNING" and not may_judge):
                continue
            was, published = s.status, s.status == "QUEUED" and s.sent
            poisoned = was == "RUNNING" and s.lost + 1 >= self.max_lost
            s.lost += was == "RUNNING"
            s.handoffs += was in ("SUCCESS", "FAILED", "CANCELLED")
            s.looks = s.looks + 1 if published else 0
            if poisoned:
                s.status, s.has_error = "FAILED", True
            elif was in ("RUNNING", "PAUSED"):
                s.status = "QUEUED"
            if was == "RUNNING" and not poisoned:
                s.worker = None
            if poisoned or was in ("SUCCESS", "FAILED", "CANCELLED"):
                s.token = None
            s.sent = True
            s.due = self.now + min(INTERVAL_MAX, INTERVAL * 2**s.looks)
            claimed.append((task_id, was, s.status))
        return claimed

    def renew(self, worker: UUID, held: list[str]) -> set[str]:
        lost = set()
        for task_id in held:
            s = self.steps[task_id]
            given_up = s.token is None and s.due is not None and (s.due <= self.now or not s.sent)
            handing_off = s.open and s.status in ("SUCCESS", "FAILED") and not given_up
            ours = s.worker == worker and (s.status == "RUNNING" or handing_off)
            received = s.status == "QUEUED" and s.sent
            if (ours or received) and s.due is not None and s.due < self.now + LEASE * 2 / 3:
                s.due, s.worker = max(s.due, self.now + LEASE), worker
            if s.status == "RUNNING" and s.worker != worker:
                lost.add(task_id)
        return lost

    def release(self, worker: UUID) -> int:
        count = 0
        for s in self.steps.values():
            received = s.status == "QUEUED" and s.sent
            if s.worker == worker and s.due is not None and (received or s.status in ("RUNNING", "SUCCESS", "FAILED")):
                count += 1
                if s.status in ("RUNNING", "QUEUED"):
                    s.queue(self.now, sent=False)
                s.token, s.due = None, self.now
        return count

    def expire(self, worker: UUID) -> int:
        count = 0
        for s in self.steps.values():
            received = s.status == "QUEUED" and s.sent
            if s.worker != worker or s.due is None or not (received or s.status in ("RUNNING", "SUCCESS", "FAILED")):
                continue
            count += 1
            s.due = self.now - 1e-6
            if s.status in ("SUCCESS", "FAILED"):
                s.token = None
                continue
            s.sent = False
            s.lost += s.status == "RUNNING"
            if s.status == "RUNNING" and s.lost >= self.max_lost:
                s.status, s.has_error, s.token = "FAILED", True, None
            else:
                s.status, s.worker = "QUEUED", None
        return count

    # --- the run

    @property
    def quiet(self) -> bool:
        return not any(s.open for s in self.steps.values())

    @property
    def verdict(self) -> str:
        statuses = {s.status for s in self.steps.values()}
        return "FAILED" if "FAILED" in statuses else "CANCELLED" if "CANCELLED" in statuses else "SUCCESS"

    def close_if_quiet(self) -> str | None:
        if self.status not in OPEN_RUN or not self.quiet:
            return None
        self.status = self.verdict
        return self.status

    def cancel(self) -> bool:
        if self.status in ("SUCCESS", "FAILED"):
            return False
        self.status = "CANCELLED"
        return True

    def cancel_steps(self) -> set[str]:
        cancelled = {task_id for task_id, s in self.steps.items() if s.unfinished}
        for task_id in cancelled:
            s = self.steps[task_id]
            s.status, s.due, s.token = "CANCELLED", self.now, None
        return cancelled

    def resume(self) -> set[str]:
        resumed = {task_id for task_id, s in self.steps.items() if s.status == "FAILED"}
        for task_id in resumed:
            s = self.steps[task_id]
            s.queue(self.now, fence=s.fence + 1, open=True, lost=0, handoffs=0, looks=0, sent=False, has_error=False)
        self.status = "RUNNING"
        return resumed

    def pause(self) -> bool:
        if self.status not in OPEN_RUN:
            return False
        self.paused = True
        return True

    def unpause(self) -> bool:
        if not self.paused:
            return False
        self.paused = False
        for s in self.steps.values():
            if s.status == "QUEUED" and s.due is None and s.has_message:
                s.due, s.sent = self.now, False
        return True
