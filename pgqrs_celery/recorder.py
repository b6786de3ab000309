"""Recording: what leaves a publish scope becomes rows in one transaction, and is then dispatched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from celery import Celery

from pgqrs_celery.borrowing import callers_session
from pgqrs_celery.circumstances import ExistingRun, Target, starting, target
from pgqrs_celery.dispatch import Dispatcher
from pgqrs_celery.drafting import Drafter
from pgqrs_celery.envelope import SENT
from pgqrs_celery.exceptions import LeaseLost
from pgqrs_celery.execution import Deferred, Execution, Phase
from pgqrs_celery.guard import StepGuard
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.mixture import await_links, refuse
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords, recording, results, runs, steps, units
from pgqrs_celery.store.chords import Chord
from pgqrs_celery.store.messages import Published
from pgqrs_celery.store.recording import Finished, NewStep, Outcome, Recorded
from pgqrs_celery.succession import hand_over, successor
from pgqrs_celery.transport.broker import Broker

__all__ = ["Recorder"]


class Recorder:
    """Writes the messages of a publish scope into the ledger and sends those that were accepted."""

    def __init__(self, app: Celery, ledger: Callable[[], Ledger]) -> None:
        self.app = app
        self._ledger = ledger
        self.drafter = Drafter(app)
        self.dispatcher = Dispatcher(app, ledger)
        #: Returns, once, the chords whose headers have these group ids.
        self.chords_of: Callable[[list[str]], list[Chord]]
        #: Returns the broker where it is ours and in the ledger's database: what is recorded is published with that.
        self.shared_broker: Callable[[], Broker | None]
        #: Whether the result backend can complete a durable chord.
        self.has_chords: Callable[[], bool]

    def __call__(self, messages: list[Outgoing], running: Execution | None) -> None:
        """Record messages, all or none, then publish what was accepted."""
        ledger = self._ledger()
        for passing in (m for m in messages if not m.durable):
            await_links(self.app, ledger, passing, running)
        durable = [m for m in messages if m.durable]
        if not durable or (running is not None and running.phase is Phase.LOST):
            return
        for message in durable:
            refuse(self.app, ledger, message, running, chords=self.has_chords)
        into = target.get()
        if into is not None:
            self._record_into(ledger, into, durable)
        elif running is not None and running.phase is Phase.SUCCEEDED and _all_inside(durable, running):
            self._defer(ledger, durable, running)
        else:
            self._record_and_send(ledger, durable, running)

    def _defer(self, ledger: Ledger, messages: list[Outgoing], running: Execution) -> None:
        """Keep what follows from a success until that is committed; it is made ready now, so that errors show now."""
        deferred = running.deferred
        deferred.rows += self.drafter.rows(ledger, messages, running, ledger.settings.resend_interval)
        deferred.chords += self.chords_of(_groups(messages))
        deferred.messages += messages

    def flush(self, running: Execution, *, going_on: bool = False) -> bool:
        """Commit a success with everything that follows from it, then send that; False where the step was lost.

        With ``going_on`` what follows may be handed to this process instead.
        """
        ledger, deferred = self._ledger(), running.deferred
        running.deferred = Deferred()
        if not deferred.messages:
            return running.settle()
        following = successor(running, deferred, self.app) if going_on else None
        if following is not None:
            following.announce()
        text, running.uncommitted = running.uncommitted, None
        guard, broker = running.guard, self.shared_broker()
        finished = Finished(guard.task_id, text) if text is not None else None
        publishing = broker is not None and following is None
        published: list[Published] = []

        def work(session: Session) -> list[Recorded]:
            published.clear()
            receiver = ledger.worker_id if following is not None else None
            entries = _commit(session, ledger, guard, deferred, finished, receiver)
            if any(entry.outcome is Outcome.LOST for entry in entries) and finished is not None:
                # The answer of an earlier commit may have been lost: then the success is there, under our token.
                return self._again(session, ledger, running, deferred)
            for chord in deferred.chords:
                chords.record(session, replace(chord, workflow_id=guard.workflow_id))
            if publishing:
                accepted = {entry.task_id: entry for entry in entries}
                published.extend(self.dispatcher.publish_within(session, deferred.messages, accepted))
            return entries

        patience = max(ledger.settings.patience, ledger.settings.lease)
        entries = ledger.call(work, patience=patience, transaction=bool(deferred.chords) or publishing)
        if any(entry.outcome is Outcome.LOST for entry in entries):
            running.lose()
            return False
        if following is not None and hand_over(self.dispatcher, following, entries[0]):
            return True
        if broker is not None:
            broker.wake(published)
        self.send_deferred(deferred, entries, published=broker is not None)
        return True

    @staticmethod
    def _again(session: Session, ledger: Ledger, running: Execution, deferred: Deferred) -> list[Recorded]:
        guard = running.guard
        if not steps.finished_as(session, guard.task_id, "SUCCESS", guard.lease_token):
            return recording.recorded(deferred.rows, [])
        return recording.record(session, deferred.rows, workflow_id=guard.workflow_id, app=ledger.app)

    def send_deferred(self, deferred: Deferred, entries: Sequence[Recorded], *, published: bool = False) -> None:
        """Send what was recorded with its sender's success, now that this is committed.

        Where the messages were ``published`` in that transaction, only the rest is done.
        """
        ledger = self._ledger()
        if any(m.held for m in deferred.messages):
            ledger.call(lambda session: runs.notify(session, ledger.channel))
        recorded = {entry.task_id: entry for entry in entries}
        if published:
            self.dispatcher.announce_refused(deferred.messages, recorded)
            return
        with self.app.producer_or_acquire() as producer:
            for message in deferred.messages:
                message.producer = producer
            self.dispatcher.send(deferred.messages, recorded)

    def _record_and_send(self, ledger: Ledger, durable: list[Outgoing], running: Execution | None) -> None:
        batches: dict[str, list[Outgoing]] = {}
        for message in durable:
            batches.setdefault(message.root_id, []).append(message)
        interval = ledger.settings.resend_interval
        prepared = [
            (root_id, batch, self.drafter.rows(ledger, batch, running, interval)) for root_id, batch in batches.items()
        ]

        theirs = callers_session(ledger, durable, running)
        if theirs is not None:
            self._record_for_commit(ledger, theirs, prepared, running)
            return
        if running is not None and not running.settle():
            return
        replaced_by = running.replaced_by if running is not None else None

        headers, broker = self.chords_of(_groups(durable)), self.shared_broker()
        if broker is not None and running is None and not headers and self._start(ledger, broker, prepared):
            return
        published: list[Published] = []

        def work(session: Session) -> dict[str, Recorded]:
            published.clear()
            if running is not None and replaced_by is not None:
                self._await_replacement(session, running, replaced_by)
            done = self._record_all(session, ledger, prepared, headers, running)
            if any(m.held for m in durable):
                runs.notify(session, ledger.channel)
            if broker is not None:
                published.extend(self.dispatcher.publish_within(session, durable, done))
            return done

        recorded = ledger.call(
            work,
            transaction=len(prepared) > 1 or replaced_by is not None or bool(headers) or broker is not None,
            patience=self._patience(ledger, running),
        )
        if running is not None:
            self._supersede(running, recorded)
        if broker is not None:
            broker.wake(published)
            self.dispatcher.announce_refused(durable, recorded)
        else:
            self.dispatcher.send(durable, recorded)

    def _start(self, ledger: Ledger, broker: Broker, prepared: list[tuple[str, list[Outgoing], list[NewStep]]]) -> bool:
        """Start a run with a single message in one round trip; False where it has more, or exists."""
        spec = starting.get()
        root_id, batch, rows = prepared[0]
        message = batch[0]
        keyed = spec is not None and spec.workflow_key is not None
        if len(prepared) > 1 or len(batch) > 1 or message.held or keyed or message.is_routed:
            return False
        message.producer = self.dispatcher.own_producer()
        sent, *events = self.dispatcher.rows(batch)
        if sent.exchange or sent.visible_at is not None:
            return False
        run, near = self.drafter.new_run(ledger, root_id, batch, spec), broker.near(sent.routing_key)
        workflow_id = ledger.call(
            lambda session: units.start(session, run, rows[0], sent, sent_header=SENT, wake=near is None)
        )
        if workflow_id is None:
            return False
        if near is not None:
            near.ring(news=True)
        self.dispatcher.report(events)
        if spec is not None:
            spec.workflow_id = workflow_id
        return True

    def _record_all(
        self,
        session: Session,
        ledger: Ledger,
        prepared: list[tuple[str, list[Outgoing], list[NewStep]]],
        headers: Sequence[Chord],
        running: Execution | None,
    ) -> dict[str, Recorded]:
        """Record the messages of each run, with the chords they are the headers of."""
        done: dict[str, Recorded] = {}
        for root_id, batch, rows in prepared:
            workflow_id, entries = self._record(session, ledger, root_id, batch, rows, running)
            done.update((entry.task_id, entry) for entry in entries)
            groups = {m.headers.get("group") for m in batch}
            for chord in headers:
                if chord.chord_id in groups and any(e.outcome is Outcome.SEND for e in entries):
                    chords.record(session, replace(chord, workflow_id=workflow_id))
        return done

    def _record_for_commit(
        self,
        ledger: Ledger,
        session: Session,
        prepared: list[tuple[str, list[Outgoing], list[NewStep]]],
        running: Execution | None,
    ) -> None:
        """Record messages in the user's transaction; the relay hears of them, and sends them, when it commits."""
        for root_id, batch, rows in prepared:
            held = [
                replace(row, sent=False, delay=message.delay or 0.0) for message, row in zip(batch, rows, strict=True)
            ]
            workflow_id, _ = self._record(session, ledger, root_id, batch, held, running)
            for chord in self.chords_of(_groups(batch)):
                chords.record(session, replace(chord, workflow_id=workflow_id))
        runs.notify(session, ledger.channel)

    @staticmethod
    def _patience(ledger: Ledger, running: Execution | None) -> float:
        return ledger.settings.patience if running is not None else 0.0

    @staticmethod
    def _supersede(running: Execution, recorded: Mapping[str, Recorded]) -> None:
        """The running step's own id belongs to a newer message now: a retry, or what replaces it."""
        own = recorded.get(running.guard.task_id)
        retried = own is not None and own.outcome is Outcome.SEND and running.phase is Phase.BODY
        if retried or running.replaced_by is not None:
            running.phase = Phase.SUPERSEDED

    @staticmethod
    def _await_replacement(session: Session, running: Execution, generation: int) -> None:
        """Let the running step wait for the last link of its replacement, in the transaction that records its first."""
        guard = running.guard
        awaited = recording.await_replacement(
            session, guard.task_id, lease_token=guard.lease_token, generation=generation
        )
        if not awaited:
            raise LeaseLost(f"step {guard.step_id!r} of run {guard.workflow_id}: replaced by another worker")

    def _record(
        self,
        session: Session,
        ledger: Ledger,
        root_id: str,
        batch: Sequence[Outgoing],
        rows: Sequence[NewStep],
        running: Execution | None,
    ) -> tuple[int, list[Recorded]]:
        if running is not None and root_id == running.guard.root_id:
            return running.guard.workflow_id, recording.record(
                session,
                rows,
                workflow_id=running.guard.workflow_id,
                app=ledger.app,
                lease_token=running.guard.lease_token,
                durable=running.phase is Phase.BODY,
            )
        spec = starting.get() if running is None else None
        run = self.drafter.new_run(ledger, root_id, batch, spec)
        started = runs.start(session, run, rows)
        if started is None:
            if spec is not None and spec.workflow_key is not None:
                found = runs.find(session, key=(ledger.app, spec.workflow_key))
                if found is not None:
                    raise ExistingRun(found)
            with session.connection.transaction():
                started = runs.join(session, run, rows)
        if spec is not None:
            spec.workflow_id = started[0]
        return started

    def _record_into(self, ledger: Ledger, into: Target, messages: list[Outgoing]) -> None:
        """Record messages in a transaction that is open already; where the broker shares it, they are in it, too."""
        rows = self.drafter.rows(ledger, messages, None, ledger.settings.resend_interval)
        for chord in self.chords_of(_groups(messages)):
            chords.record(into.session, replace(chord, workflow_id=into.workflow_id))
        entries = recording.record(into.session, rows, workflow_id=into.workflow_id, app=ledger.app)
        into.recorded.update((entry.task_id, entry) for entry in entries)
        into.messages += messages
        if self.shared_broker() is not None:
            into.published += self.dispatcher.publish_within(into.session, messages, into.recorded)

    def send(self, into: Target) -> None:
        """Send what was recorded in a transaction that has been committed, or wake who is to take it."""
        broker = self.shared_broker()
        if broker is not None:
            broker.wake(into.published)
            self.dispatcher.announce_refused(into.messages, into.recorded)
            return
        with self.app.producer_or_acquire() as producer:
            for message in into.messages:
                message.producer = producer
            self.dispatcher.send(into.messages, into.recorded)


def _all_inside(messages: Sequence[Outgoing], running: Execution) -> bool:
    return all(message.root_id == running.guard.root_id for message in messages)


def _groups(messages: Sequence[Outgoing]) -> list[str]:
    return list(dict.fromkeys(str(m.headers["group"]) for m in messages if m.headers.get("group")))


def _commit(
    session: Session,
    ledger: Ledger,
    guard: StepGuard,
    deferred: Deferred,
    finished: Finished | None,
    receiver: UUID | None,
) -> list[Recorded]:
    """Commit a success, if it is still to be committed, with the rows of what follows from it.

    ``receiver`` is the worker that has what follows at hand, if it is not sent.
    """
    if finished is not None and len(deferred.rows) == 1 and session.is_idle:  # the common form, in half the time
        return units.finish(
            session,
            app=ledger.app,
            lease_token=guard.lease_token,
            output=finished.output,
            outcome=results.Outcome(guard.task_id, "SUCCESS"),
            following=deferred.rows[0],
            hand_off=False,
            next_worker=receiver,
        ).recorded
    return recording.record(
        session,
        deferred.rows,
        workflow_id=guard.workflow_id,
        app=ledger.app,
        lease_token=guard.lease_token,
        finished=finished,
        durable=False,
    )
