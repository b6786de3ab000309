"""The Celery result backend: ``backend="pgqrs+postgresql://…"``.

It is found through an entry point, so nothing has to be imported, and it serves every task, durable or not.

- One upsert stores a result; the first SUCCESS wins.
- Waiting is pushed (``waiting``); reading several results is one statement.
- A chord's part is stored in the transaction of the result (``chording``); no ``celery.chord_unlock`` exists here.
- One instance serves all threads of a process and survives forks.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, TypeVar

import psycopg
from celery import current_app, states
from celery.backends.asynchronous import AsyncBackendMixin
from celery.backends.base import Backend
from celery.exceptions import BackendGetMetaError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import result_from_tuple
from celery.utils.log import get_logger
from kombu.exceptions import ContentDisallowed
from psycopg.conninfo import conninfo_to_dict

from pgqrs_celery import urls
from pgqrs_celery.chording import ChordMixin
from pgqrs_celery.conf import PREFIX, Settings, keys_of
from pgqrs_celery.databases import database_for
from pgqrs_celery.encoding import pack, unpack
from pgqrs_celery.exceptions import ConfigurationError, NotInstalled, StoreError, StoreUnavailable
from pgqrs_celery.session import Session
from pgqrs_celery.store import chords, migrations, results, waiters
from pgqrs_celery.store.payloads import Payload
from pgqrs_celery.store.results import LAST, Outcome, Part, Result
from pgqrs_celery.waiting import ResultConsumer

__all__ = ["PostgresBackend"]

logger = get_logger(__name__)

T = TypeVar("T")
Meta = dict[str, Any]

#: Seconds between two batches of clearing away in one process; at once again while there is more.
TIDY_INTERVAL: Final = 60.0
TIDY_AGAIN: Final = 1.0


class PostgresBackend(ChordMixin, Backend, AsyncBackendMixin):
    """Celery's results in Postgres.

    The URL is a libpq URL behind ``pgqrs+``; its parameters that begin with ``pgqrs_`` override the settings of that
    name. ``result_expires`` and its relatives, ``result_serializer``, ``result_compression``, ``result_extended``,
    ``result_chord_…`` and ``result_backend_…retry…`` mean what Celery's documentation says.
    """

    ResultConsumer = ResultConsumer

    persistent = True
    supports_autoexpire = True
    supports_native_join = True
    supports_result_compression = True
    supports_failure_expires = True

    # What Celery's base classes set, and their stubs do not tell.
    url: str
    expires: Any
    serializer: str
    max_retries: Any
    _cache: Any
    _get_result_meta: Any
    _pending_results: Any
    _pending_messages: Any

    def __init__(self, app: Any, url: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("expires_type", float)
        super().__init__(app, url=url, **kwargs)
        address = readable(url or "")
        conf = {key: app.conf[key] for key in keys_of(app.conf) if key.lower().startswith(PREFIX)}
        self.settings = Settings.read(conf | address.settings)
        self.namespace = self.settings.namespace or app.main or "celery"
        self.database = database_for(address.dsn, self.settings)
        self.thread_safe = True
        self.chord_sink = getattr(getattr(app, "pgqrs", None), "chords", None)
        failure = app.conf.get("result_failure_expires")
        self.failure_expires = self.expires if failure is None else self.prepare_expires(failure, float)
        chord = app.conf.get("result_chord_expires")
        self.chord_expires = self.expires if chord is None else self.prepare_expires(chord, float)
        self._apply_retry_policy((app.conf.get("result_backend_transport_options") or {}).get("retry_policy") or {})
        self._reset()
        self.result_consumer = self.ResultConsumer(
            self, self.app, self.accept, self._pending_results, self._pending_messages
        )
        _backends.add(self)

    def _apply_retry_policy(self, policy: dict[str, Any]) -> None:
        if policy:
            self.always_retry = True
            self.max_retries = policy.get("max_retries", self.max_retries)
            if "interval_max" in policy:
                self.max_sleep_between_retries_ms = int(policy["interval_max"] * 1000)
            if "interval_step" in policy:
                self.base_sleep_between_retries_ms = int(policy["interval_step"] * 1000)

    def _reset(self) -> None:
        self._joint = threading.local()
        self._tidying = threading.Lock()
        self._tidy_at = time.monotonic() + TIDY_INTERVAL

    def forget_inherited(self) -> None:
        """Start afresh in a forked child: what the parent waits for or has cached is the parent's."""
        for mapping in self._pending_results:
            mapping.clear()
        self._pending_messages.clear()
        self._pending_messages.total = 0
        self._cache.clear()
        self._reset()
        self.result_consumer._after_fork()  # type: ignore[attr-defined]

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL, as it was configured, without its passwords unless they are asked for."""
        url = self.url if self.url.startswith("pgqrs") else f"pgqrs+{self.url}"
        return url if include_password else urls.mask(url)

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return _restore, (type(self), self.url, {"expires": self.expires, "serializer": self.serializer})

    # -- the database ----------------------------------------------------------------------------------------------

    def call(self, work: Callable[[Session], T], *, patience: float = 0.0, transaction: bool = False) -> T:
        """Return ``work(session)``; installs the schema first where that is allowed and it is missing."""
        try:
            return self.database.call(work, patience=patience, transaction=transaction)
        except NotInstalled:
            if not self.database.auto_install:
                raise
            migrations.install(self.database)
            return self.database.call(work, patience=patience, transaction=transaction)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether the same call may succeed later (``result_backend_always_retry``)."""
        return isinstance(exc, StoreUnavailable)

    # -- storing ---------------------------------------------------------------------------------------------------

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        part = self.part(request, state, result) if self._joining and state in states.READY_STATES else None
        self.write(self._outcome(str_id(task_id), result, state, traceback, request, part))
        return result

    def outcome(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
    ) -> Outcome:
        """Return what finishing a task leaves behind, encoded but not stored.

        For those who store it in a transaction of their own, with ``results.store`` or ``results.store_with_part``;
        afterwards they tell the waiters (``waiters.wake_statement``) and look at the chord (``chords.peek``).
        """
        encoded = self.encode_result(result, state)
        part = self.part(request, state, encoded)
        if store_result and not getattr(request, "ignore_result", False):
            return self._outcome(task_id, encoded, state, traceback, request, part)
        return Outcome(task_id, state, part=part)

    def _outcome(
        self, task_id: str, encoded: Any, state: str, traceback: Any, request: Any, part: Part | None
    ) -> Outcome:
        meta = self._get_result_meta(result=encoded, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        expires = self.failure_expires if state == states.FAILURE else self.expires
        return Outcome(task_id, state, self.payload(meta), expires or None, part, state in states.READY_STATES)

    def part(self, request: Any, state: str, encoded: Any) -> Part | None:
        """Return the chord part that a finished task delivers, or None where it is not in a chord's header."""
        if not (request and request.chord and request.group and request.id):
            return None
        idx = LAST if request.group_index is None else int(request.group_index)
        return Part(str_id(request.group), idx, str_id(request.id), state, self.payload(encoded))

    def payload(self, value: Any) -> Payload:
        """Return a value as it is stored."""
        return pack(value, self.serializer, getattr(self, "compression", None))

    def write(self, outcome: Outcome) -> bool:
        """Store an outcome, then tell its waiters; return whether the chord it belongs to seems complete.

        Result and part are one transaction. The look for waiters and the look at the chord follow its commit, in the
        same network flush.
        """
        complete = self.call(lambda session: chords.deliver(session, outcome), patience=self.settings.patience)
        if complete is None:
            self.place_chord(outcome)
            complete = self.call(lambda session: chords.deliver(session, outcome), patience=self.settings.patience)
        if outcome.part is not None:
            self.looked(outcome.part, bool(complete))
        return bool(complete)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _get_task_meta_for(self, task_id: Any) -> Meta:
        found = self.call(lambda session: results.fetch(session, str_id(task_id)))
        return {"status": states.PENDING, "result": None} if found is None else self.meta(found)

    def meta(self, found: Result) -> Meta:
        """Return a stored result's meta; raises ``BackendGetMetaError`` naming the task where it cannot be read."""
        try:
            meta = self.meta_from_decoded(self.decode(found.payload))
        except ContentDisallowed:
            raise
        except Exception as error:
            raise BackendGetMetaError(  # type: ignore[call-arg]
                f"the stored result of task {found.task_id} cannot be read ({type(error).__name__}: {error}); it was "
                "written by something else or is damaged: forget() it and run the task again",
                task_id=found.task_id,
            ) from error
        meta["task_id"] = found.task_id
        return dict(meta)

    def decode(self, payload: Any) -> Any:
        """Return the value of a payload of ours; anything else is decoded as Celery does."""
        return unpack(payload, self.accept) if isinstance(payload, Payload) else super().decode(payload)

    def read_metas(self, task_ids: Collection[str], register: str | None = None) -> list[Meta]:
        """Return the metas of those tasks that have one, with one statement.

        With ``register``, that channel is registered as a waiter for them first, in a transaction that has been
        committed before the read begins. A result that cannot be read is reported as that task's failure, so that the
        others are not held up.
        """

        def work(session: Session) -> list[Result]:
            if register is not None:
                waiters.register(session, register, task_ids)
            return results.fetch_many(session, task_ids)

        return [self._readable(found) for found in self.call(work)]

    def notified_meta(self, task_id: str, data: str) -> Meta:
        """Return the meta that came with a notification."""
        return self._readable(Result(task_id, "", Payload(data=data)))

    def _readable(self, found: Result) -> Meta:
        try:
            return self.meta(found)
        except (BackendGetMetaError, ContentDisallowed) as error:
            return {"task_id": found.task_id, "status": states.FAILURE, "result": error, "traceback": None}

    def task_result_exists(self, task_id: str) -> bool:
        """Whether anything is stored for the task, be it a PENDING written by hand."""
        return self.call(lambda session: results.fetch(session, str_id(task_id))) is not None

    def get_many(
        self,
        task_ids: Collection[Any],
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        READY_STATES: Collection[str] = states.READY_STATES,  # noqa: N803 (Celery's name)
    ) -> Iterator[tuple[str, Meta]]:
        """Yield the final metas of several tasks as they come; each look is one statement for all of them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        missing = {str_id(task_id) for task_id in task_ids}
        for task_id in list(missing):
            if task_id in self._cache:
                missing.discard(task_id)
                yield task_id, self._cache[task_id]
        iterations = 0
        try:
            while missing:
                for meta in self.read_metas(missing):
                    if meta["status"] in READY_STATES:
                        missing.discard(meta["task_id"])
                        self._cache[meta["task_id"]] = meta
                        if on_message is not None:
                            on_message(meta)
                        yield meta["task_id"], meta
                iterations += 1
                if not missing or (max_iterations and iterations >= max_iterations):
                    return
                left = interval or 0.5
                if deadline is not None:
                    left = min(left, deadline - time.monotonic())
                    if left <= 0:
                        raise CeleryTimeout(f"Operation timed out ({timeout})")
                if on_interval:
                    on_interval()
                self.result_consumer.subscribe(missing)
                self.result_consumer.drain_events(left)
        finally:
            for task_id in missing:
                self.result_consumer.cancel_for(task_id)

    def forget(self, task_id: Any) -> None:
        """Remove a task's result, here and in the database."""
        super().forget(task_id)
        self.result_consumer.cancel_for(str_id(task_id))

    def _forget(self, task_id: Any) -> None:
        self.call(lambda session: results.forget(session, str_id(task_id)))

    # -- groups ----------------------------------------------------------------------------------------------------

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = self.payload({"result": result.as_tuple()})
        self.call(lambda session: results.save_group(session, str_id(group_id), payload, self.expires or None))
        return result

    def _restore_group(self, group_id: str) -> Meta | None:
        payload = self.call(lambda session: results.fetch_group(session, str_id(group_id)))
        if payload is None:
            return None
        meta: Meta = self.decode(payload)
        meta["result"] = result_from_tuple(meta["result"], self.app)
        return meta

    def _delete_group(self, group_id: str) -> None:
        self.call(lambda session: results.forget_group(session, str_id(group_id)))

    # -- clearing away ---------------------------------------------------------------------------------------------

    def cleanup(self) -> None:
        """Remove everything that has expired, batch by batch (``celery.backend_cleanup`` calls this)."""
        while self.call(results.prune).more:
            pass

    def process_cleanup(self) -> None:
        """After a task: once a minute, remove a batch of what has expired and look for forgotten chords.

        That is why results expire without a beat or a relay, as long as any worker is busy.
        """
        if time.monotonic() < self._tidy_at or not self._tidying.acquire(blocking=False):
            return
        try:
            self._tidy_at = time.monotonic() + TIDY_INTERVAL
            if self.call(results.prune).more:
                self._tidy_at = time.monotonic() + TIDY_AGAIN
            self.revive_chords()
        except StoreError as error:
            logger.warning("could not clear away expired results: %s", error)
        finally:
            self._tidying.release()


def readable(url: str) -> urls.Address:
    """Return what the URL says; raises ``ConfigurationError`` where libpq cannot make anything of it."""
    address = urls.parse(url)
    try:
        conninfo_to_dict(address.dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(f"the URL {urls.mask(url)!r} cannot be read: {error}") from None
    return address


def str_id(task_id: Any) -> str:
    """Return a task, group or chord id as text."""
    if isinstance(task_id, bytes):
        return task_id.decode()
    if not task_id:
        raise ValueError(f"an id must not be empty, got {task_id!r}")
    return str(task_id)


def _restore(cls: type[PostgresBackend], url: str, kwargs: dict[str, Any]) -> PostgresBackend:
    """Unpickle: the current app's backend if it is the same one, so that results do not bring connections along."""
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    present = getattr(app, "backend", None)
    if type(present) is cls and present.url == url:
        return present
    return cls(app, url=url, **kwargs)


_backends: weakref.WeakSet[PostgresBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend.forget_inherited()


os.register_at_fork(after_in_child=_after_fork)
