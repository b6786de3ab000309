"""The statuses of runs and steps: one set for both, as the tables' CHECK constraints have it.

They describe the ledger. Celery's own states (``PENDING``, ``STARTED``, ``RETRY`` …) live on in the result
backend; the two meet in ``gate.py``.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["OPEN", "TERMINAL", "Status"]


class Status(StrEnum):
    """Where a run or a step stands."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


#: Statuses in which work is still to come.
OPEN = frozenset({Status.QUEUED, Status.RUNNING, Status.PAUSED})

#: Statuses that only ``resume()`` or a record from outside can leave.
TERMINAL = frozenset({Status.SUCCESS, Status.FAILED, Status.CANCELLED})
