"""One transaction for ledger, result and broker, where they are in the same database: the unit of work.

A step's success, the rows of what follows it, its hand-off, its task result and its chord part are committed together;
with our own broker also the messages of what follows, and the end of the step's own message. What comes after
(waking who waits, looking whether the chord is complete and the run can close) needs a snapshot taken after its
commit, but no round trip of its own: everything travels in one network flush.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from celery import Celery

from pgqrs_celery.backend import PostgresBackend
from pgqrs_celery.execution import Deferred, Execution
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.recorder import Recorder
from pgqrs_celery.session import Session
from pgqrs_celery.store import recording, results, runs, steps, units, waiters
from pgqrs_celery.store.messages import NewMessage, Published, insertion
from pgqrs_celery.store.recording import Finished, Recorded
from pgqrs_celery.store.recording import Outcome as Recording
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.succession import successor, take
from pgqrs_celery.transport import Transport
from pgqrs_celery.transport.broker import Broker, broker_for

__all__ = ["Joint", "own_broker", "shares_ledger"]

SENDING: Final = Recording.SEND


def shares_ledger(backend: Any, ledger: Ledger) -> bool:
    """Return whether results and ledger are in one database and schema, so that they can share a transaction."""
    return isinstance(backend, PostgresBackend) and backend.database is ledger.database


def own_broker(app: Celery) -> Broker | None:
    """Return the app's broker where it is ours, else None."""
    with app.connection_for_write() as connection:
        return broker_for(connection) if issubclass(connection.get_transport_cls(), Transport) else None


@dataclass(frozen=True, slots=True)
class Joint:
    """What shares the ledger's transactions: the result backend, and the broker where that is Postgres, too."""

    ledger: Ledger
    broker: Broker | None

    def finish(self, recorder: Recorder, running: Execution, outcome: Outcome) -> bool:
        """Commit a finished step and everything that follows from it, then send what is not sent by that.

        One transaction holds its success (if that is still to be committed), the rows of what it sends, its hand-off,
        its result and its chord part; with our own broker also the messages themselves and the end of its own. A
        step that was taken over by somebody else, or was handed off before, leaves nothing. Returns whether the chord
        the step belongs to seems complete.
        """
        ledger = self.ledger
        if running.deferred.chords and not recorder.flush(running):
            # A chord is entered only once the success that begins it is known to count.
            return False
        deferred, running.deferred = running.deferred, Deferred()
        following = successor(running, deferred, recorder.app) if outcome.part is None else None
        if following is not None:
            own = self.own_message(running)
            take(ledger, recorder.dispatcher, running, following, outcome=outcome, own_message_id=own)
            return False
        events: list[NewMessage] = []

        def work(session: Session) -> Answer:
            prepared = self._prepare(recorder, running, deferred, outcome)
            if prepared is None:
                return _write(session, self, recorder, running, deferred, outcome)
            events[:] = prepared[1:]
            return _write_unit(session, self, running, deferred, outcome, prepared[:1])

        answer = ledger.call(work, patience=max(ledger.settings.patience, ledger.settings.lease))
        uncommitted, running.uncommitted = running.uncommitted, None
        if not answer.accepted and uncommitted is not None:
            running.lose()
            return False
        recorder.dispatcher.report(events)
        return self._follow(recorder, running, deferred, answer)

    def own_message(self, running: Execution) -> UUID | None:
        """Return the row of the message that a step came with, where its end belongs to the step's transaction."""
        tag = (running.request.properties or {}).get("delivery_tag") if self.broker is not None else None
        return UUID(str(tag)) if tag else None

    def _follow(self, recorder: Recorder, running: Execution, deferred: Deferred, answer: Answer) -> bool:
        """Do what comes after the commit; returns whether the chord the step belongs to seems complete."""
        if answer.published and self.broker is not None:
            self.broker.wake(answer.published)
        if deferred.messages:
            recorder.send_deferred(deferred, answer.recorded, published=self.broker is not None)
        if answer.quiet:
            self.ledger.call(lambda session: runs.close_if_quiet(session, running.guard.workflow_id))
        return answer.complete

    def _prepare(
        self, recorder: Recorder, running: Execution, deferred: Deferred, outcome: Outcome
    ) -> list[NewMessage] | None:
        """Return what a unit sends that fits into one statement (a message, then its event), or None."""
        if running.uncommitted is None or outcome.part is not None or len(deferred.rows) > 1:
            return None
        if self.broker is None or not deferred.rows:
            return []
        # The statement publishes only what it records.
        sent_at = running.guard.database_time()
        recorded = {row.task_id: Recorded(row.task_id, SENDING, sent_at) for row in deferred.rows}
        messages = recorder.dispatcher.collect(deferred.messages, recorded)
        return messages if all(not m.exchange and m.visible_at is None for m in messages[:1]) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the database said about a finished step."""

    accepted: bool
    recorded: list[Recorded]
    published: list[Published]
    complete: bool
    quiet: bool


def _write_unit(
    session: Session,
    joint: Joint,
    running: Execution,
    deferred: Deferred,
    outcome: Outcome,
    messages: list[NewMessage],
) -> Answer:
    """Write a unit of work that fits into one statement."""
    guard = running.guard
    assert running.uncommitted is not None
    unit = units.finish(
        session,
        app=joint.ledger.app,
        lease_token=guard.lease_token,
        output=running.uncommitted,
        outcome=outcome,
        following=deferred.rows[0] if deferred.rows else None,
        message=messages[0] if messages else None,
        own_message_id=joint.own_message(running),
    )
    # The answer of an earlier commit may have been lost: then the step is finished under our token.
    ours = unit.accepted or steps.finished_as(session, guard.task_id, "SUCCESS", guard.lease_token)
    sent = [m for m, entry in zip(messages, unit.recorded, strict=False) if entry.outcome is SENDING]
    news = [Published(m.routing_key, False, 1, None) for m in sent]
    return Answer(ours, unit.recorded, news, False, unit.quiet)


def _write(
    session: Session, joint: Joint, recorder: Recorder, running: Execution, deferred: Deferred, outcome: Outcome
) -> Answer:
    guard, finished = running.guard, None
    if running.uncommitted is not None:
        finished = Finished(guard.task_id, running.uncommitted, hand_off=True)
    peeked = quiet = published = None
    entries: list[Recorded] = []
    with session.flush() as pipeline:
        with session.committed():
            noted = _record(session, joint.ledger, running, deferred, finished) if deferred.rows else None
            if noted is not None and joint.broker is not None:
                # What was recorded decides what is published, in the same transaction.
                session.limit_silence()
                pipeline.sync()  # else the server would take the silence for a statement that is not complete
                entries = recording.recorded(deferred.rows, noted.fetchall())
                messages = recorder.dispatcher.collect(deferred.messages, {entry.task_id: entry for entry in entries})
                if messages:
                    published = session.send(*insertion(messages))
            accepted = _store(session, running, deferred, finished, outcome)
            own = joint.own_message(running)
            if own is not None:  # its work is done, whoever has the message now
                session.send("messages.delete", {"message_ids": [own]})
        # Each of these has a snapshot of its own, taken after the commit.
        if outcome.result:
            session.send(waiters.wake_statement(outcome.final), {"task_id": outcome.task_id})
        if outcome.part is not None:
            peeked = session.send("chords.peek", {"chord_id": outcome.part.chord_id})
        elif not deferred.rows:
            quiet = session.send("runs.quiet", {"workflow_id": guard.workflow_id})
    ours = _true(accepted)
    if not ours and finished is not None:
        # The answer of an earlier commit may have been lost: then the step is finished under our token.
        ours = steps.finished_as(session, guard.task_id, "SUCCESS", guard.lease_token)
    if noted is not None and joint.broker is None:
        entries = recording.recorded(deferred.rows, noted.fetchall())
    news = [Published(*row) for row in published.fetchall()] if published is not None else []
    return Answer(ours, entries, news, peeked is not None and _true(peeked), quiet is not None and _true(quiet))


def _record(session: Session, ledger: Ledger, running: Execution, deferred: Deferred, finished: Finished | None) -> Any:
    return recording.record_cursor(
        session,
        deferred.rows,
        workflow_id=running.guard.workflow_id,
        app=ledger.app,
        lease_token=running.guard.lease_token,
        finished=finished,
        durable=False,
    )


def _store(
    session: Session, running: Execution, deferred: Deferred, finished: Finished | None, outcome: Outcome
) -> Any:
    """Store result and chord part under the condition that the hand-off is ours to make."""
    guard = running.guard
    params: dict[str, Any] = {"task_id": guard.task_id, "lease_token": guard.lease_token}
    if finished is None:
        condition, params = "steps.hand_off", {"task_id": guard.task_id, "fence": guard.fence}
    elif deferred.rows:
        condition = "steps.finished_by"
    else:
        condition, params = "steps.succeed_and_hand_off", {**params, "output": finished.output}
    return results.store_cursor(session, outcome, accepted=session.text(condition), params=params)


def _true(cursor: Any) -> bool:
    row = cursor.fetchone()
    return bool(row and row[0])
