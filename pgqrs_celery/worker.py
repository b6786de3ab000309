"""What every worker runs beside its pool: the relay, the lease keeper, and the worker's presence."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import Celery, bootsteps
from celery.worker import state

from pgqrs_celery.board import Board
from pgqrs_celery.exceptions import NotInstalled, SchemaOutdated, StoreError, StoreUnavailable
from pgqrs_celery.forks import NoFork
from pgqrs_celery.incarnation import Incarnation
from pgqrs_celery.leases import Keeper
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.permission import Permission
from pgqrs_celery.presence import Presence
from pgqrs_celery.relay import Relay
from pgqrs_celery.remote import RemoteControl
from pgqrs_celery.store import migrations, runs, workers
from pgqrs_celery.task import ledger_of

__all__ = ["DurabilityStep", "GiveBackStep"]

logger = logging.getLogger(__name__)

#: Exit status of a worker that must not start.
EX_FAILURE = 1

#: Seconds between two looks for pool processes that have died.
POOL_LOOK = 0.5


class RelayThread:
    """Keeps the worker present and, unless the settings say otherwise, relays what is due."""

    def __init__(self, ledger: Ledger, presence: Presence, relay: Relay | None) -> None:
        self.ledger = ledger
        self.presence = presence
        self.relay = relay
        self._stop = threading.Event()
        self._no_fork = NoFork()
        self._thread = threading.Thread(target=self._run, name="pgqrs-relay", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for the message it may be sending."""
        self._stop.set()
        try:
            self.ledger.call(lambda session: runs.notify(session, self.ledger.channel))
        except StoreError as error:
            logger.debug("the relay stops without being called: %s", error)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                if not self.presence.is_open:
                    with self._no_fork:
                        self.presence.open()
                        self.ledger.call(lambda session: workers.forget(session, app=self.ledger.app))
                self._serve()
                failures = 0
            except StoreUnavailable as error:
                failures += 1
                pause = min(5.0, 0.1 * 2.0**failures)
                logger.warning("the relay has lost the database and tries again in %.1f s: %s", pause, error)
                self.presence.abandon()
                self._stop.wait(pause)
            except Exception:
                logger.exception("the relay failed and goes on")
                self._stop.wait(1.0)

    def _serve(self) -> None:
        """Watch and relay until something goes wrong or the worker stops."""
        look = due = time.monotonic()
        called = True
        while not self._stop.is_set():
            now = time.monotonic()
            with self._no_fork:
                if now >= look:
                    look = now + self.presence.watch()
                if self.relay is not None and now >= due:
                    due, called = now + self.relay.work(called=called), False
            until = look if self.relay is None else min(look, due)
            if self.presence.wait(max(0.0, until - time.monotonic())):
                due, called = 0.0, True


class DurabilityStep(bootsteps.StartStopStep):
    """The worker bootstep: starts after the pool, before the consumer."""

    requires = ("celery.worker.components:Pool",)
    label = "pgqrs"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._threads: RelayThread | None = None
        self._keeper: Keeper | None = None
        self._presence: Presence | None = None
        self._pool_look: Any = None
        self._received: list[str] = []
        # Made before the pool forks: parent and children share their pages ...
        ledger = ledger_of(parent.app)
        ledger.incarnation = Incarnation()
        ledger.board = None
        if ledger.settings.local_continuation:
            ledger.board = Board()
        self._permission: Permission | None = None
        self._remote: RemoteControl | None = None
        # ... and found out before: a process that is replaced may be forked while the relay would be at it.
        parent.app.pgqrs.shared_broker  # noqa: B018

    def start(self, parent: Any) -> None:
        """Verify the schema, then start relay and keeper."""
        app: Celery = parent.app
        ledger = ledger_of(app)
        self._verify(ledger)
        presence = self._presence = Presence(ledger, parent.hostname)
        presence.open()
        pgqrs: Any = app.pgqrs  # type: ignore[attr-defined]
        relay = Relay(app, ledger, pgqrs.publish, pgqrs.chords.revive) if ledger.settings.relay else None
        self._threads = RelayThread(ledger, presence, relay)
        self._threads.start()
        self._keeper = Keeper(ledger)
        self._keeper.start()
        if ledger.board is not None and not parent.use_eventloop:
            logger.info("local continuation is off: the worker has no event loop")
        parent.pgqrs = self

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """Let a prefork pool look for dead processes often; called again after every reconnection to the broker.

        Celery looks when the pipe of a process closes. That is a moment before the kernel lets the exit be seen: more
        often than not it finds nobody dead, and looks again after five seconds.
        """
        maintain_pool = getattr(getattr(parent.pool, "_pool", None), "maintain_pool", None)
        if self._pool_look is not None:
            self._pool_look.cancel()
        board = ledger_of(parent.app).board
        if board is not None and self._permission is None:
            self._permission = Permission(parent, ledger_of(parent.app), board)
            self._remote = RemoteControl(parent, ledger_of(parent.app), board)
            self._remote.install()
        permission = self._permission

        def look() -> None:
            if maintain_pool is not None:
                maintain_pool()
            if permission is not None:
                permission.look()

        if maintain_pool is not None or permission is not None:
            self._pool_look = hub.call_repeatedly(POOL_LOOK, look)
        if permission is not None:
            permission.look()
            hub.on_tick.add(permission.tick)

    def _verify(self, ledger: Ledger) -> None:
        """Return when the database answers and holds this version's schema; a worker without one must not start."""
        failures = 0
        while True:
            try:
                ledger.prepare()
                migrations.verify(ledger.database)
                return
            except StoreUnavailable as error:
                failures += 1
                pause = min(10.0, 0.25 * 2.0**failures)
                logger.warning("waiting for the database, next try in %.1f s: %s", pause, error)
                threading.Event().wait(pause)
                if state.should_stop is not None or state.should_terminate is not None:
                    raise SystemExit(EX_FAILURE) from error
            except (NotInstalled, SchemaOutdated) as error:
                logger.critical("%s", error)
                raise SystemExit(EX_FAILURE) from error

    def close(self, parent: Any) -> None:
        """Note what this worker has received, as long as its requests exist."""
        if self._permission is not None:
            self._permission.withdraw()
        self._received = [held.task_id for held in ledger_of(parent.app).holdings.present()]

    def stop(self, parent: Any) -> None:
        """Stop relaying; leases are kept until the pool has stopped."""
        if self._remote is not None:
            self._remote.uninstall()
        if self._threads is not None:
            self._threads.stop()

    terminate = stop

    def give_back(self) -> None:
        """The pool has stopped: give back at once, uncounted, what was not finished."""
        if self._keeper is not None:
            self._keeper.stop()
        if self._presence is not None:
            try:
                self._presence.close(self._received)
            except StoreError as error:
                logger.warning("what this worker had not finished is due when its leases end: %s", error)


class GiveBackStep(bootsteps.StartStopStep):
    """The consumer bootstep: a consumer is shut down when the pool has ended, however the worker is stopped.

    (``worker_shutdown`` is not sent by a cold shutdown, and the worker's own steps are all stopped before its pool.)
    """

    label = "pgqrs"

    def shutdown(self, consumer: Any) -> None:
        """Let the worker give back what it has."""
        step: DurabilityStep | None = getattr(consumer.controller, "pgqrs", None)
        if step is not None:
            step.give_back()
