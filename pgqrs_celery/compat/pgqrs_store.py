"""A connected database: what ``connect`` returns and everything else in the guides' API is given."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakValueDictionary

from pgqrs_celery import ids
from pgqrs_celery.codec import Codec
from pgqrs_celery.conf import Settings
from pgqrs_celery.databases import database_for
from pgqrs_celery.exceptions import RunCancelled, RunFailed, RunNotFound
from pgqrs_celery.failures import load_error
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.records import RunRecord
from pgqrs_celery.session import Session
from pgqrs_celery.states import TERMINAL, Status
from pgqrs_celery.store import consumed, migrations

if TYPE_CHECKING:
    from pgqrs_celery.compat.pgqrs_context import PyWorkflow
    from pgqrs_celery.monitor import Monitor

__all__ = ["NAMESPACE", "RunResult", "Store", "connect"]

T = TypeVar("T")

#: The app that such runs belong to: no Celery worker's relay looks after them.
NAMESPACE: Final = "pgqrs.compat"

#: Pauses between two looks at a run that somebody waits for, in seconds.
FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.25


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run as it stood when it was asked for; ``output`` is the value, None until it has succeeded."""

    id: int
    name: str
    status: str
    output: Any
    error: BaseException | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of the run will happen any more by itself."""
        return self.status in TERMINAL

    def value(self) -> Any:
        """Return the output; raises the run's error, ``RunFailed`` or ``RunCancelled``."""
        if self.status == Status.CANCELLED:
            raise RunCancelled(f"run {self.id} was cancelled")
        if self.status == Status.FAILED:
            raise self.error or RunFailed(f"run {self.id} failed")
        return self.output


class Store:
    """A database, a schema in it and a namespace; awaitable methods, whose work is done in threads."""

    def __init__(self, dsn: str, schema: str | None = None, *, namespace: str = NAMESPACE) -> None:
        settings = Settings.read({"pgqrs_dsn": dsn, "pgqrs_schema": schema})
        self.ledger = Ledger(
            settings=settings,
            app=namespace,
            values=Codec(),
            database=database_for(dsn, settings),
            channel=ids.relay_channel(settings.schema, namespace),
        )
        #: Contexts in use, so that low-level steps of one run are acquired in one execution of it.
        self.contexts: WeakValueDictionary[int, PyWorkflow] = WeakValueDictionary()
        self.opening = threading.Lock()

    def __repr__(self) -> str:
        return f"<Store of schema {self.ledger.database.schema!r}>"

    @cached_property
    def _monitor(self) -> Monitor:
        from pgqrs_celery.monitor import Monitor

        return Monitor(self.ledger.database)

    async def call(self, work: Callable[[Session], T], *, transaction: bool = False) -> T:
        """Return ``work(session)``, done in a thread."""
        return await asyncio.to_thread(self.ledger.call, work, transaction=transaction)

    async def install(self) -> list[str]:
        """Install or upgrade the schema; returns the names of the migrations applied."""
        return await asyncio.to_thread(migrations.install, self.ledger.database)

    async def create_workflow(self, name: str) -> bool:
        """Define a workflow, so that it may be triggered; idempotent, False where it was defined before."""
        app = self.ledger.app
        return await self.call(lambda session: consumed.define(session, app=app, name=name))

    async def get_run(self, run_id: int) -> RunResult:
        """Return a run as it stands; raises ``RunNotFound``."""
        return await asyncio.to_thread(self.run, run_id)

    async def wait_for_run(self, run_id: int, timeout: float | None = None) -> RunResult:
        """Return a run when it has ended; raises ``TimeoutError`` after ``timeout`` seconds."""
        async with asyncio.timeout(timeout):
            pause = FIRST_PAUSE
            while not (found := await self.get_run(run_id)).has_ended:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, LONGEST_PAUSE)
            return found

    def run(self, run_id: int) -> RunResult:
        """Return a run as it stands, in this thread."""
        record = self._monitor.run(run_id)
        if record is None:
            raise RunNotFound(f"run {run_id} does not exist (or was removed by retention)")
        return self._result(record)

    def outcome(self, run_id: int) -> Any:
        """Return the output of a run that has ended, or raise its error."""
        return self.run(run_id).value()

    def _result(self, record: RunRecord) -> RunResult:
        output = self.ledger.values.load(record.output) if record.output else None
        error = error_of(record)
        return RunResult(record.workflow_id, record.name, record.status, output, error)


def error_of(record: RunRecord) -> BaseException | None:
    """Return the error a run has failed with."""
    if not record.error:
        return None
    cause = json.loads(record.error)
    return load_error(json.dumps(cause["error"])) if cause.get("error") else None


async def connect(dsn: str, schema: str | None = None) -> Store:
    """Connect to a database; raises ``StoreUnavailable`` where nobody answers.

    The schema need not be installed yet: ``admin(store).install()`` does that.
    """
    store = Store(dsn, schema)

    await asyncio.to_thread(store.ledger.database.call, lambda session: session.connection.execute("SELECT 1"))
    return store
