"""Housekeeping: what has expired is removed a little at a time, by the relay of any worker."""

from __future__ import annotations

import time
from typing import Final

from pgqrs_celery.ledger import Ledger
from pgqrs_celery.store import results, retention, workers

__all__ = ["Housekeeping"]

#: Seconds between two batches; less where a batch was full. Every worker does this, needed or not.
INTERVAL: Final = 300.0
AGAIN: Final = 1.0
BATCH: Final = 100


class Housekeeping:
    """Removes ended runs (``pgqrs_retention``), expired results and the traces of workers that are gone."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._next = time.monotonic() + INTERVAL

    def work(self) -> None:
        """Remove a batch if it is time. Raises ``StoreUnavailable``."""
        if time.monotonic() < self._next:
            return
        more = self.batch(self.ledger.settings.retention)
        self.ledger.call(lambda session: workers.forget(session, app=self.ledger.app))
        self._next = time.monotonic() + (AGAIN if more else INTERVAL)

    def batch(self, age: float | None) -> int:
        """Remove a batch of everything whose time is over and return how many rows; 0 means that nothing is left.

        Runs are removed ``age`` seconds after their end; None keeps them.
        """
        ledger, removed = self.ledger, 0
        if age is not None:
            removed += ledger.call(
                lambda session: retention.prune_runs(session, app=ledger.app, age=age, limit=BATCH), transaction=True
            )
        return removed + ledger.call(results.prune).total
