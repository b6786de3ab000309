"""The ledger of one app: its settings, its database, and who is writing."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeVar
from uuid import UUID

from pgqrs_celery.board import Board
from pgqrs_celery.conf import Settings
from pgqrs_celery.db import Database
from pgqrs_celery.holdings import Holdings
from pgqrs_celery.incarnation import Incarnation
from pgqrs_celery.session import Session
from pgqrs_celery.store import migrations

__all__ = ["Ledger", "Values"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Values(Protocol):
    """What turns values into JSON text and back."""

    def dump(self, value: Any) -> str:
        """Return the value as JSON text."""

    def dump_result(self, value: Any, step: str) -> str:
        """Return a step's result as JSON text; raises a ``StepError`` naming the step."""

    def load(self, text: str | None) -> Any:
        """Return the value that was stored as this text."""

    def load_again(self, text: str, value: Any) -> Any:
        """Return what ``load`` makes of the text that a value was just dumped as."""


@dataclass(slots=True)
class Ledger:
    """What every part of the package needs to read and write one app's runs."""

    settings: Settings
    app: str
    values: Values
    database: Database
    channel: str
    #: Who executes: None outside a worker.
    incarnation: Incarnation | None = None
    #: What the processes of this worker's pool go on with by themselves; None where they never do.
    board: Board | None = None
    #: What this process has received (a worker's main process only).
    holdings: Holdings = field(default_factory=Holdings)
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def worker_id(self) -> UUID | None:
        """The incarnation of the worker this process belongs to."""
        return self.incarnation.worker_id if self.incarnation else None

    @property
    def may_judge(self) -> bool:
        """Whether an expired lease may be believed: not within one lease after this worker's session began.

        A restart of Postgres ends every session at once; the owners of running steps need the time to renew their
        leases before anybody takes these for abandoned.
        """
        return self.incarnation is None or self.incarnation.session_age() >= self.settings.lease

    def call(
        self,
        work: Callable[[Session], T],
        *,
        patience: float = 0.0,
        transaction: bool = False,
        stop: threading.Event | None = None,
    ) -> T:
        """Return ``work(session)``; see ``Database.call``."""
        if not self._ready.is_set():
            self.prepare()
        return self.database.call(work, patience=patience, transaction=transaction, stop=stop)

    def prepare(self) -> None:
        """Install the schema where the settings or an embedded server say so; otherwise do nothing."""
        if self.database.auto_install:
            for name in migrations.install(self.database):
                logger.info("installed %s", name)
        self._ready.set()

    @property
    def poison(self) -> str:
        """The error of a step whose workers keep dying, in the form Celery's backends read."""
        return _poison(self.settings.max_lost)


@cache
def _poison(max_lost: int) -> str:
    return json.dumps(
        {
            "exc_type": "PoisonedStep",
            "exc_module": "pgqrs_celery.exceptions",
            "exc_message": [
                f"killed its worker {max_lost} times (pgqrs_max_lost); it is not tried again until the run is resumed"
            ],
        }
    )
