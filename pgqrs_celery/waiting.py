"""Waiting for results: the client side of the pushed results, as Celery's ``BaseResultConsumer``.

A process that waits has one LISTEN connection, opened when somebody first waits for something that is not there yet.
Sending tasks, ``then()`` and groups open nothing. Several threads share it: one of them, the leader, listens for all,
the others wait for the leader; when it leaves, another one takes over. Under gevent and eventlet Celery's drainer
greenlet is the leader.

The order of things is what makes it safe (see ``store/waiters.py``): look; if it is not there, listen, register,
commit, look again; then sleep. After a lost connection: listen again, register again, look again. Only a waiter's own
time-out ends its waiting once it has reached the database.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from celery import states
from celery.backends.asynchronous import BaseResultConsumer, Drainer
from celery.exceptions import TimeoutError as CeleryTimeout

from pgqrs_celery.exceptions import StoreUnavailable
from pgqrs_celery.listener import Listener
from pgqrs_celery.store import waiters

__all__ = ["ResultConsumer"]

logger = logging.getLogger(__name__)

Meta = dict[str, Any]

#: A look at everything that is waited for, although nothing was notified: normally, and where nothing can be.
RECHECK: Final = 30.0
RECHECK_DEAF: Final = 0.5
#: So many results are registered for before the first look, if the process listens already: the look that a wait
#: would begin with is then spared, and a registration in vain costs little.
FEW: Final = 32
#: The longest pause between two attempts to reach a database that went away.
BACKOFF: Final = 2.0


@dataclass(eq=False, slots=True)
class Wait:
    """One ``get()`` or ``join()`` in progress."""

    task_ids: frozenset[str]
    on_message: Callable[[Meta], Any] | None


class ResultConsumer(BaseResultConsumer):
    """Delivers results to those who wait, in this process."""

    backend: Any
    drainer: Any
    _pending_results: Any
    _pending_messages: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._reset()

    def _reset(self) -> None:
        self._turn = threading.Condition()
        self._leading = False
        self._ids: set[str] = set()
        #: No longer waited for; and registered although the result turned out to be there.
        self._dropped: deque[str] = deque()
        self._unneeded: deque[str] = deque()
        self._waits: list[Wait] = []
        self._listener = Listener(self.backend.database, self.backend.settings.direct_dsn)
        self._recheck_at = 0.0
        self._failures = 0

    # -- what Celery calls ---------------------------------------------------------------------------------------

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        """Do nothing yet: only a real wait is worth a connection."""

    def consume_from(self, task_id: str) -> None:
        """Do nothing yet: only a real wait is worth a connection."""

    def cancel_for(self, task_id: str) -> None:
        """Note that nobody waits for the task any more; called from destructors, so it takes no lock."""
        if task_id in self._ids:
            self._dropped.append(task_id)

    def stop(self) -> None:
        """Close the LISTEN connection; a later wait opens a new one."""
        self._listener.close()

    def on_after_fork(self) -> None:
        """Start afresh in a child: nothing of the parent's is waited for here, and its connection is not ours."""
        self._listener.abandon()
        self._reset()
        self.drainer = type(self.drainer)(self)

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait until something has been delivered, by this thread or another one, for at most ``timeout`` seconds."""
        timeout = 1.0 if timeout is None else timeout
        with self._turn:
            if self._leading or not self._wanted():
                self._turn.wait(timeout)
                return
            self._leading = True
        try:
            self._lead(timeout)
        finally:
            with self._turn:
                self._leading = False
                self._turn.notify_all()

    def _wait_for_pending(
        self,
        result: Any,
        timeout: float | None = None,
        on_interval: Callable[..., Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        interval: float = 0.5,
        **kwargs: Any,
    ) -> Iterator[None]:
        deadline = None if timeout is None else time.monotonic() + timeout

        def drain(timeout: float) -> None:
            left = timeout if deadline is None else min(timeout, deadline - time.monotonic())
            self.drain_events(max(left, 0.0))

        with self._waiting_for(result, on_message):
            self.on_wait_for_pending(result)
            try:
                for _ in self.drainer.drain_events_until(
                    result.on_ready,
                    timeout=timeout,
                    interval=1 if timeout is None else min(1, timeout),
                    on_interval=on_interval and at_most_every(interval, on_interval),
                    wait=drain,
                ):
                    yield
                    time.sleep(0)
            except TimeoutError:
                raise CeleryTimeout("The operation timed out.") from None
            if on_interval and (getattr(result, "_cache", None) or {}).get("status") in states.PROPAGATE_STATES:
                on_interval()  # raises the error of what came before, which is the cause, if there is one

    def on_wait_for_pending(self, result: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Deliver what is there already, and have the rest announced.

        The first look may fail: a wrong URL or a missing schema should be heard of at once.
        """
        missing = {leaf.id for leaf in leaves(result) if not leaf._cache}
        if self._listener.connected and len(missing) <= FEW:
            self.subscribe(missing)
            return
        if missing:
            for meta in self.backend.read_metas(missing):
                self.deliver(meta)
                if meta["status"] in states.READY_STATES:
                    missing.discard(meta["task_id"])
        if missing:
            self.subscribe(missing)

    # -- the work ------------------------------------------------------------------------------------------------

    @contextmanager
    def _waiting_for(self, result: Any, on_message: Callable[[Meta], Any] | None) -> Iterator[None]:
        wait = Wait(frozenset(leaf.id for leaf in leaves(result)), on_message)
        with self._turn:
            self._waits.append(wait)
        try:
            yield
        finally:
            with self._turn:
                self._waits.remove(wait)
            if not self._greenlets:
                # What has not come is waited for no longer; Celery keeps timed-out results, but another wait for
                # them begins with a look.
                self._dropped.extend(wait.task_ids & self._ids)

    def subscribe(self, task_ids: Collection[str]) -> None:
        """Have these results delivered when they come; looks once more after the registration has been committed."""
        with self._turn:
            self._ids.update(task_ids)
            connected = self._listener.connected
            if not connected:
                self._recheck_at = 0.0
            self._turn.notify_all()
        if not connected:
            return
        try:
            self._look(task_ids)
        except StoreUnavailable as error:
            logger.warning("%s; the results will be looked up again", error)
            self._recheck_at = 0.0

    def _wanted(self) -> bool:
        return bool(self._ids) or (self._greenlets and bool(self._pending_results[0]))

    @property
    def _greenlets(self) -> bool:
        return type(self.drainer) is not Drainer

    def _lead(self, timeout: float) -> None:
        try:
            if not self._listener.connected:
                self._listener.connect()
                self._recheck_at = 0.0
            if self._greenlets:
                self._adopt()
            self._drop()
            now = time.monotonic()
            if now >= self._recheck_at:
                self._recheck_at = now + (RECHECK if self._listener.proven else RECHECK_DEAF)
                self._look(self._copy())
                if not self._wanted():
                    return
            self._hear(self._listener.wait(max(0.0, min(timeout, self._recheck_at - time.monotonic()))))
            self._failures = 0
        except StoreUnavailable as error:
            self._recheck_at = 0.0
            self._failures += 1
            if self._failures == 1:
                logger.warning("%s; still waiting for %d results", error, len(self._ids))
            time.sleep(min(timeout, BACKOFF, 0.05 * 2 ** min(self._failures, 10)))

    def _copy(self) -> set[str]:
        with self._turn:
            return set(self._ids)

    def _adopt(self) -> None:
        """Under a drainer greenlet, wait for results with callbacks (``then``), too."""
        new = {task_id for task_id in list(self._pending_results[0]) if isinstance(task_id, str)} - self._copy()
        if new:
            with self._turn:
                self._ids |= new
            self._look(new)

    def _drop(self) -> None:
        gone = set()
        while self._dropped:
            task_id = self._dropped.popleft()
            if task_id in self._ids and not any(task_id in wait.task_ids for wait in list(self._waits)):
                gone.add(task_id)
        while self._unneeded:
            gone.add(self._unneeded.popleft())
        if gone:
            with self._turn:
                self._ids -= gone
            self.backend.call(lambda session: waiters.cancel(session, self._listener.channel, gone))

    def _look(self, task_ids: Collection[str]) -> None:
        """Register, commit, then read."""
        if task_ids:
            for meta in self.backend.read_metas(task_ids, register=self._listener.channel):
                if meta["status"] in states.READY_STATES:
                    self._unneeded.append(meta["task_id"])
                self.deliver(meta)

    def _hear(self, payloads: Collection[str]) -> None:
        """Deliver what was notified; ask for what did not come along, with one statement."""
        wanted, ask = self._copy(), set()
        for task_id, data in map(waiters.heard, payloads):
            if task_id not in wanted:
                continue
            if data is None:
                ask.add(task_id)
            else:
                self.deliver(self.backend.notified_meta(task_id, data))
        if ask:
            for meta in self.backend.read_metas(ask):
                self.deliver(meta)

    def deliver(self, meta: Meta) -> None:
        """Hand a result, or a change of state, to everybody in this process who waits for it."""
        task_id = meta["task_id"]
        if meta["status"] in states.READY_STATES:
            with self._turn:
                self._ids.discard(task_id)
        for wait in list(self._waits):
            if wait.on_message is not None and task_id in wait.task_ids:
                wait.on_message(meta)
        self.on_state_change(meta, None)
        # Where nobody waited Celery has buffered it; there is no need, because it can be read again.
        buffered = self._pending_messages.pop(task_id, None)
        if buffered is not None:
            self._pending_messages.total -= len(buffered)


def at_most_every(seconds: float, call: Callable[[], Any]) -> Callable[[], None]:
    """Return the callback, with calls left out that come too early after the last one, or after now.

    ``get()`` on a chain asks for the state of every parent there, one statement each: not after every notification.
    """
    last = time.monotonic()

    def called() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            call()

    return called


def leaves(result: Any) -> Iterator[Any]:
    """Yield the task results in a result, a group, or groups within groups."""
    members = getattr(result, "results", None)
    if members is None:
        yield result
        return
    for member in members:
        yield from leaves(member)
