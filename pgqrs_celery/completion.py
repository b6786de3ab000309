"""Durable chords: recorded with their header, completed by looking.

A chord whose body is durable, over the Postgres result backend in the ledger's own database, is one row, inserted
in the transaction that records its header. Parts are inserted with the members' hand-offs. Whoever sees, after his
commit, that all parts are in, locks the chord's row, looks again in the next statement, and records the body in that
transaction: the body starts once, whoever dies. The run's row is never locked here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from celery import Celery
from celery.canvas import maybe_signature
from celery.exceptions import ChordError

from pgqrs_celery.circumstances import Target, target
from pgqrs_celery.durability import has_durable_task, heads
from pgqrs_celery.joint import shares_ledger
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.recorder import Recorder
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords, runs
from pgqrs_celery.store.chords import Chord, Look, State

__all__ = ["DurableChords"]

logger = logging.getLogger(__name__)

#: Chords applied in this thread whose header is about to be sent, by the header's group id.
_pending: ContextVar[dict[str, Chord] | None] = ContextVar("pgqrs_chords", default=None)


class DurableChords:
    """The durable side of the result backend's chords: its ``chord_sink``."""

    def __init__(self, app: Celery, ledger: Callable[[], Ledger], recorder: Recorder) -> None:
        self.app = app
        self._ledger = ledger
        self._recorder = recorder

    # -- before: the chord waits for its header ------------------------------------------------------------------------

    def take_chord(self, chord: Chord, body: Any) -> bool:
        """Take over a chord with a durable body; its header is sent next, in this thread."""
        if not shares_ledger(self.app.backend, self._ledger()):
            return False
        if not all(has_durable_task(self.app, head) for head in heads(body)):
            return False
        waiting = _pending.get()
        if waiting is None:
            waiting = {}
            _pending.set(waiting)
        waiting[chord.chord_id] = chord
        return True

    def take_size(self, chord_id: str, size: int) -> bool:
        """Note how many members a header has that is being sent."""
        waiting = _pending.get() or {}
        if chord_id not in waiting:
            return False
        waiting[chord_id] = replace(waiting[chord_id], size=size)
        return True

    def taken(self, chord_ids: Collection[str]) -> list[Chord]:
        """Return, once, the chords whose headers are being recorded."""
        waiting = _pending.get() or {}
        return [waiting.pop(chord_id) for chord_id in chord_ids if chord_id in waiting]

    def leave_plain(self, chord_id: str | None) -> None:
        """A plain task is sent as a member of this header: its chord is the backend's business."""
        for chord in self.taken([chord_id] if chord_id else []):
            self._ledger().call(lambda session, chord=chord: chords.record(session, chord))  # type: ignore[misc]

    # -- after: the body -----------------------------------------------------------------------------------------------

    def complete(self, chord_id: str) -> None:
        """Record and send the body of a chord if all its parts are in, or fail it if one of them is a failure."""
        ledger, backend = self._ledger(), self.app.backend
        with ledger.database.transaction() as session:
            look = chords.look(session, chord_id)
            if look.state is State.FAILED:
                # What follows is told outside this transaction: it locks runs, and here a chord is locked.
                chords.claim(session, chord_id)
            into = self._record_body(session, chord_id, look) if look.state is State.COMPLETE else None
        if into is not None:
            self._recorder.send(into)
        elif look.state is State.FAILED:
            self._fail(ledger, backend, chord_id, look)

    def _record_body(self, session: Session, chord_id: str, look: Look) -> Target:
        """Record the body in the transaction that locks its chord."""
        assert look.workflow_id is not None
        run = runs.find(session, workflow_id=look.workflow_id)
        assert run is not None
        backend: Any = self.app.backend
        stored = backend._stored(look)
        into = Target(session, look.workflow_id, run.root_id)
        token = target.set(into)
        try:
            values = backend.header_values(look, stored.get("shape"))
            body: Any = maybe_signature(stored["callback"], app=self.app)
            body.apply_async((values,), root_id=run.root_id, add_to_parent=False)
        finally:
            target.reset(token)
        chords.dispatched(session, chord_id)
        return into

    def _fail(self, ledger: Ledger, backend: Any, chord_id: str, look: Look) -> None:
        """Fail the body as Celery does when its header has failed, then let the run close."""
        stored = backend._stored(look)
        body = maybe_signature(stored.get("callback"), app=self.app)
        try:
            backend.header_values(look, stored.get("shape"))
        except ChordError as error:
            logger.info("chord %s: its header failed: %s", chord_id, error)
            if body is not None:
                backend.fail_body(body, error, look.parts)

        def close(session: Session) -> None:
            chords.failed(session, chord_id)
            if look.workflow_id is not None:
                runs.close_if_quiet(session, look.workflow_id)

        ledger.call(close, patience=ledger.settings.patience)

    def revive(self) -> None:
        """Complete chords whose last member died before it could: the relay's backstop."""
        ledger = self._ledger()
        if not shares_ledger(self.app.backend, ledger):
            return
        for ripe in ledger.call(lambda session: chords.ripe(session, ledger.app, durable=True)):
            backend: Any = self.app.backend
            backend.finish_chord(ripe.chord_id)
