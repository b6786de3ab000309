"""Chords on the Postgres backend: recording, parts, and the completion of those whose body is a plain task.

The statements and the argument why a chord is completed by exactly one of its members are in ``store/chords.py``. Here
is what Celery wants to happen then: the body is sent with the header's results in their order, or the body is failed
with ``ChordError`` and its errbacks are called.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from celery import states
from celery.app.task import Context
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, allow_join_result
from celery.utils.functional import _regen, maybe_list  # type: ignore[attr-defined]
from celery.utils.log import get_logger
from kombu.serialization import prepare_accept_content

from pgqrs_celery.conf import Settings
from pgqrs_celery.encoding import pack, unpack
from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords
from pgqrs_celery.store.chords import Chord, Look, State
from pgqrs_celery.store.results import Outcome, Part

__all__ = ["ChordMixin", "ChordSink"]

logger = get_logger(__name__)

T = TypeVar("T")

#: The header of a chord as it was written: task ids, and lists where a member is a group itself.
Shape = list[Any]


class ChordSink(Protocol):
    """Whoever records the chords of durable tasks together with their headers; see ``ChordMixin.chord_sink``."""

    def take_chord(self, chord: Chord, body: Any) -> bool:
        """Take over the recording of a chord; False leaves it to the backend."""

    def take_size(self, chord_id: str, size: int) -> bool:
        """Take over the size of a chord's header; False leaves it to the backend."""

    def complete(self, chord_id: str) -> None:
        """Record and send the body of a durable chord whose parts seem to be in, or fail it."""


class ChordMixin:
    """The chord half of ``PostgresBackend``."""

    #: Set by the durable core, whose chords are recorded in the transaction that records their headers.
    chord_sink: ChordSink | None = None

    app: Any
    settings: Settings
    namespace: str
    chord_expires: float | None
    call: Callable[..., Any]
    task_result_exists: Callable[[str], bool]
    store_result: Callable[..., Any]
    part: Callable[..., Part | None]
    write: Callable[[Outcome], bool]
    encode_result: Callable[[Any, str], Any]
    exception_to_python: Callable[[Any], Any]
    chord_error_from_stack: Callable[..., Any]
    accept: Any
    _joint: threading.local

    # -- before: the chord and its size ------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: tuple[Any, ...], body: Any, **kwargs: Any) -> None:
        """Record a chord; Celery sends the header after this."""
        chord = self.chord(header_result_args, body)
        if self.chord_sink is None or not self.chord_sink.take_chord(chord, body):
            self.call(lambda session: chords.record(session, chord), patience=self.settings.patience)

    def chord(self, header_result_args: tuple[Any, ...], body: Any) -> Chord:
        """Return the chord to be recorded, encoded but not stored."""
        chord_id, members = header_result_args[0], header_result_args[1]
        serializer = body.options.get("serializer") or self.app.conf.task_serializer
        shape = None
        # A header that is a generator must not be consumed here; it holds no groups.
        if not isinstance(members, _regen) and any(isinstance(member, GroupResult) for member in members):
            shape = shape_of(members)
        payload = pack({"callback": dict(body), "shape": shape}, serializer)
        body_id = body.options.get("task_id")
        return Chord(str(chord_id), self.namespace, body_id, payload, None, self.chord_expires or None)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Set how many parts complete the chord; called before the last member of its header is sent."""
        if self.chord_sink is None or not self.chord_sink.take_size(group_id, chord_size):
            chord = Chord(str(group_id), self.namespace, size=chord_size, expires=self.chord_expires or None)
            self.call(lambda session: chords.resize(session, chord), patience=self.settings.patience)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Expect one more member (``Task.add_to_chord``)."""
        self.call(lambda session: chords.extend(session, str(chord_id)), patience=self.settings.patience)

    def place_chord(self, outcome: Outcome) -> None:
        """Make a row for a chord that nobody recorded: its header was a group that was told to call back."""
        if outcome.part is not None:
            chord = Chord(outcome.part.chord_id, self.namespace, expires=self.chord_expires or None)
            self.call(lambda session: chords.place(session, chord), patience=self.settings.patience)

    # -- meanwhile: result and part in one transaction ---------------------------------------------------------------

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """While this is open, ``store_result`` stores a header member's part with its result.

        Celery stores the result first and delivers the part afterwards; a process that dies in between leaves a chord
        that never completes.
        """
        depth = getattr(self._joint, "depth", 0)
        if depth == 0:
            self._joint.looks = {}
        self._joint.depth = depth + 1
        try:
            yield
        finally:
            self._joint.depth = depth

    @property
    def _joining(self) -> bool:
        return getattr(self._joint, "depth", 0) > 0

    def looked(self, part: Part, complete: bool) -> None:
        """Remember what the look after a part's commit has shown, for ``on_chord_part_return``."""
        if self._joining:
            self._joint.looks[(part.chord_id, part.idx, part.task_id)] = complete

    def mark_as_done(self, *args: Any, **kwargs: Any) -> Any:
        """Store a success."""
        with self._joined():
            return super().mark_as_done(*args, **kwargs)  # type: ignore[misc]

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> Any:
        """Store a failure, fail the rest of the chain and call the errbacks."""
        with self._joined():
            return super().mark_as_failure(*args, **kwargs)  # type: ignore[misc]

    def mark_as_revoked(self, *args: Any, **kwargs: Any) -> Any:
        """Store a revocation."""
        with self._joined():
            return super().mark_as_revoked(*args, **kwargs)  # type: ignore[misc]

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, propagate: bool | None = None, **kwargs: Any
    ) -> None:
        """Deliver a member's part, unless it was stored with the result, and complete the chord if it was the last."""
        part = self.part(request, state, self.encode_result(result, state))
        if part is None:
            return
        looks = self._joint.looks if self._joining else {}
        complete = looks.pop((part.chord_id, part.idx, part.task_id), None)
        if complete is None:
            complete = self.write(Outcome(part.task_id, state, part=part))
        if complete:
            self.finish_chord(part.chord_id, request.chord)

    # -- after: the body ---------------------------------------------------------------------------------------------

    def finish_chord(self, chord_id: str, callback: Mapping[str, Any] | None = None) -> None:
        """Send the body of a plain chord, or fail it, if all parts are in and nobody else is doing so.

        ``callback`` is the body's signature where it is at hand; else the recorded one is used. What goes wrong with
        the database is logged, not raised: the member's own result is safe, and ``revive_chords`` tries again.
        """
        try:
            look = self.call(lambda session: claim(session, chord_id), transaction=True)
            if look.workflow_id is not None and self.chord_sink is not None:
                self.chord_sink.complete(chord_id)
            elif look.state in (State.COMPLETE, State.FAILED):
                self._close(chord_id, look, callback)
        except StoreError as error:
            logger.warning("chord %s could not be completed now, it will be looked at again: %s", chord_id, error)

    def _close(self, chord_id: str, look: Look, callback: Mapping[str, Any] | None) -> None:
        stored = self._stored(look)
        if callback is None and look.body_id and self.task_result_exists(look.body_id):
            # Revived although it had been sent: whoever sent it died before it could say so.
            self.call(lambda session: chords.dispatched(session, chord_id))
            return
        signature = maybe_signature(callback or stored.get("callback"), app=self.app)
        if signature is None:
            logger.error("chord %s is complete, but the body was never recorded", chord_id)
            return
        try:
            values = self.header_values(look, stored.get("shape"))
        except ChordError as error:
            logger.exception("Chord %r raised: %r", chord_id, error)
            self._fail(chord_id, look, signature, error)
        except Exception as error:
            logger.exception("Chord %r raised: %r", chord_id, error)
            self._fail(chord_id, look, signature, chord_error(f"Join error: {error!r}", error))
        else:
            self._send(chord_id, look, signature, values)

    def _send(self, chord_id: str, look: Look, signature: Any, values: list[Any]) -> None:
        publish = getattr(self.app.amqp, "_retry_publish", lambda send, *args: send(*args))
        try:
            publish(signature.delay, values)
        except Exception as error:
            logger.exception("Chord callback for %r raised: %r", chord_id, error)
            self._fail(chord_id, look, signature, chord_error(f"Callback error: {error!r}", error))
        else:
            self.call(lambda session: chords.dispatched(session, chord_id), patience=self.settings.patience)

    def _fail(self, chord_id: str, look: Look, signature: Any, error: ChordError) -> None:
        self.fail_body(signature, error, look.parts)
        self.call(lambda session: chords.failed(session, chord_id), patience=self.settings.patience)

    def fail_body(self, signature: Any, error: ChordError, parts: Iterable[Part] = ()) -> None:
        """Fail the body of a chord and what follows it; to be called while the exception is being handled.

        Celery stops at the body. Where the body is itself a member of another chord's header, that chord would wait for
        ever, so its part is delivered here. ``Signature.link_error`` puts the errbacks of an outer chord on the inner
        ones, too; those that have been called for an inner chord are not called again.
        """
        told = {errback for part in parts if part.told for errback in json.loads(part.told)}
        lasts = list(last_tasks(signature))
        for each in [signature, *lasts]:
            errbacks = maybe_list(each["options"].get("link_error")) or []
            each["options"]["link_error"] = [e for e in errbacks if identity(e) not in told]
        self.chord_error_from_stack(signature, error)
        told.update(identity(e) for each in [signature, *lasts] for e in each["options"]["link_error"])
        for last in lasts:
            self._deliver_failure(last, error, told=json.dumps(sorted(told)))

    def _deliver_failure(
        self,
        signature: Mapping[str, Any],
        error: BaseException,
        state: str = states.FAILURE,
        told: str | None = None,
    ) -> None:
        """Deliver a failed part for a task that will never run, if it is a member of a header."""
        options = signature["options"]
        request = Context(options, id=options.get("task_id"), group=options.get("group_id"))
        part = self.part(request, state, self.encode_result(error, state))
        if part is not None and self.write(Outcome(part.task_id, state, part=replace(part, told=told))):
            self.finish_chord(part.chord_id, options["chord"])

    def _fail_chain(
        self,
        chain: Any,
        exc: BaseException,
        traceback: Any = None,
        store_result: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Fail what a failed task would have been followed by, the members of groups included.

        Celery fails the group as such, but it is its members that a ``GroupResult`` waits for.
        """
        super()._fail_chain(chain, exc, traceback, store_result=store_result, state=state)  # type: ignore[misc]
        for element in chain if isinstance(chain, list | tuple) else ():
            if isinstance(element, Mapping) and element.get("subtask_type") == "group":
                for last in last_tasks(element):
                    task_id = last["options"].get("task_id")
                    if store_result and task_id:
                        self.store_result(task_id, exc, state, traceback=traceback)
                    self._deliver_failure(last, exc, state)

    def _stored(self, look: Look) -> dict[str, Any]:
        if not look.payload:
            return {}
        return dict(unpack(look.payload, prepare_accept_content(self.app.conf.accept_content)))

    def header_values(self, look: Look, shape: Shape | None = None) -> list[Any]:
        """Return what the header returned, in its order and shape; raises ``ChordError`` for its first failure."""
        values: dict[str, Any] = {}
        flat = []
        for part in look.parts:
            values[part.task_id] = self.part_value(part)
            flat.append(values[part.task_id])
        if shape is None:
            return flat
        if set(ids_in(shape)) <= values.keys():
            return fill(shape, values)
        # A member that delivers no part of its own can still have a result.
        with allow_join_result():
            timeout = self.app.conf.result_chord_join_timeout
            return list(self._group(shape).join_native(timeout=timeout, propagate=True))

    def part_value(self, part: Part) -> Any:
        """Return what a member returned; raises ``ChordError`` where it failed."""
        value = unpack(part.payload, self.accept)
        if part.status in states.EXCEPTION_STATES:
            value = self.exception_to_python(value)
        if part.failed:
            raise chord_error(f"Dependency {part.task_id} raised {value!r}", value)
        return value

    def _group(self, shape: Shape) -> Any:
        members = [self._group(node) if isinstance(node, list) else self.app.AsyncResult(node) for node in shape]
        return self.app.GroupResult(None, members)

    def revive_chords(self) -> None:
        """Complete plain chords whose last member died before it could."""
        for ripe in self.call(lambda session: chords.ripe(session, self.namespace, durable=False)):
            self.finish_chord(ripe.chord_id)


def claim(session: Session, chord_id: str) -> Look:
    """Look at a chord; where it is complete and plain, take the right to close it."""
    look = chords.look(session, chord_id)
    if look.workflow_id is not None:
        return Look(State.WAITING, look.workflow_id)
    if look.state in (State.COMPLETE, State.FAILED):
        chords.claim(session, chord_id)
    return look


def chord_error(message: str, cause: object) -> ChordError:
    """Return a ``ChordError`` that says what caused it."""
    error = ChordError(message)
    if isinstance(cause, Exception):
        error.__cause__ = cause
    return error


def last_tasks(signature: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the signatures whose results are the result of a canvas: a chain's last, a chord's body, each of a group.

    A canvas that has travelled in a message is made of plain dictionaries.
    """
    kind = signature.get("subtask_type")
    kwargs = signature.get("kwargs") or {}
    if kind == "group":
        for member in kwargs.get("tasks") or ():
            yield from last_tasks(member)
    elif kind == "chain" and kwargs.get("tasks"):
        yield from last_tasks(kwargs["tasks"][-1])
    elif kind == "chord" and kwargs.get("body"):
        yield from last_tasks(kwargs["body"])
    else:
        yield signature


def identity(errback: Mapping[str, Any]) -> str:
    """Return what makes two signatures the same errback."""
    call = [errback.get("task"), list(errback.get("args") or ()), dict(errback.get("kwargs") or {})]
    return json.dumps(call, sort_keys=True, default=repr)


def shape_of(members: Any) -> Shape:
    """Return the ids of a header's results, with a list for every group among them."""
    return [shape_of(m.results) if isinstance(m, GroupResult) else m.id for m in members]


def ids_in(shape: Shape) -> Iterator[str]:
    """Yield the task ids in a shape."""
    for node in shape:
        if isinstance(node, list):
            yield from ids_in(node)
        else:
            yield node


def fill(shape: Shape, values: Mapping[str, Any]) -> list[Any]:
    """Return the shape with every task id replaced by its value."""
    return [fill(node, values) if isinstance(node, list) else values[node] for node in shape]
