"""Succession: a process that has finished a step goes on with the next one itself, in one of two ways.

With our own result backend in the ledger's database, or without results, one transaction is the whole unit of work:
there the process *takes* the next step together with the success. With any other backend the result is still to be
stored, which may take long. So the next step is recorded as if its message were sent, and handed to this process: it
asks for the step when it hands the present one off, and a relay sends the message when that takes too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from celery import Celery, signals

from pgqrs_celery.continuation import Candidate, candidate
from pgqrs_celery.dispatch import Dispatcher
from pgqrs_celery.execution import Deferred, Execution
from pgqrs_celery.guard import new_token
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Session
from pgqrs_celery.store import leases, steps, units
from pgqrs_celery.store.recording import Outcome as Fate
from pgqrs_celery.store.recording import Recorded
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.store.units import Taking

__all__ = ["hand_over", "successor", "take"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the database said."""

    accepted: bool
    recorded: list[Recorded]
    #: Under what this process has the next step, and when it asked for it (of its monotonic clock); None if it has not.
    taken: tuple[Taking, float] | None = None


def successor(running: Execution, deferred: Deferred, app: Celery) -> Candidate | None:
    """Return what this process may go on with itself, of what follows from a success that is not committed yet."""
    single = len(deferred.rows) == len(deferred.messages) == 1
    if running.uncommitted is None or deferred.chords or not single:
        return None
    return candidate(running, deferred.messages[0], deferred.rows[0], app)


def hand_over(dispatcher: Dispatcher, following: Candidate, entry: Recorded) -> bool:
    """Hand a step to this process whose message was recorded as sent; False where that was not accepted."""
    if entry.outcome is not Fate.SEND:
        following.leave()
        return False
    report = _tell(dispatcher, following.message, entry.sent_at)
    following.hand_over(entry)
    if report is not None:
        report()
    return True


def take(
    ledger: Ledger,
    dispatcher: Dispatcher,
    running: Execution,
    following: Candidate,
    *,
    outcome: Outcome,
    own_message_id: UUID | None,
) -> None:
    """Commit a unit of work and take what follows, unless another owner has the step.

    Where the next step cannot be taken, it is sent by a relay.
    """
    output = running.uncommitted
    assert output is not None
    report = _tell(dispatcher, following.message, running.guard.database_time())
    following.announce()
    token = new_token()

    def work(session: Session) -> Answer:
        return _take(session, ledger, running, output, following, outcome, own_message_id, token)

    answer = ledger.call(work, patience=max(ledger.settings.patience, ledger.settings.lease))
    running.uncommitted = None
    if answer.taken is not None:
        following.take(answer.recorded[0], *answer.taken)
    else:
        following.leave()
    if not answer.accepted:
        running.lose()
        return
    if report is not None:
        report()
    dispatcher.announce_refused([following.message], {entry.task_id: entry for entry in answer.recorded})


def _tell(dispatcher: Dispatcher, message: Outgoing, sent_at: datetime) -> Callable[[], None] | None:
    """Tell who hears of messages, though this one is not sent: he may have a say in it (in its headers, say)."""
    told = signals.before_task_publish.receivers or signals.after_task_publish.receivers
    return dispatcher.tell(message, sent_at) if told or message.sent_event else None


def _take(
    session: Session,
    ledger: Ledger,
    running: Execution,
    output: str,
    following: Candidate,
    outcome: Outcome,
    own_message_id: UUID | None,
    token: UUID,
) -> Answer:
    guard, asked_at = running.guard, time.monotonic()
    worker_id = ledger.worker_id  # looked at each time: after an outage the worker is another incarnation
    assert worker_id is not None
    taking = Taking(token, worker_id, ledger.settings.lease)
    unit, taken = units.go_on(
        session,
        app=ledger.app,
        lease_token=guard.lease_token,
        output=output,
        outcome=outcome,
        following=following.step,
        taking=taking,
        own_message_id=own_message_id,
    )
    if unit.accepted:
        return Answer(True, unit.recorded, (taking, asked_at) if taken else None)
    # The answer of an earlier commit may have been lost: then the step is finished, and the next taken, as we wanted.
    # The lease of that began then, and may be over by now.
    task_id = following.step.task_id
    leases.renew(session, [task_id], worker_id=taking.worker_id, lease=taking.lease)
    if steps.finished_as(session, task_id, "RUNNING", token):
        sent = Recorded(task_id, Fate.SEND, guard.database_time())
        return Answer(True, [sent], (taking, asked_at))
    return Answer(steps.finished_as(session, guard.task_id, "SUCCESS", guard.lease_token), unit.recorded)
