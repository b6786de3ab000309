"""``@pgqrs.task(transactional=True)``: what the body writes and that it succeeded are one commit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgqrs_celery import execution, lending
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import LeaseLost
from pgqrs_celery.execution import Execution, Phase
from pgqrs_celery.session import Session
from pgqrs_celery.store import steps

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs

__all__ = ["committed", "transactional"]


def transactional(pgqrs: Pgqrs, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the body of a task that is executed in a transaction: ``pgqrs.connection``, ``pgqrs.session``.

    Called directly or eagerly it is a transaction as well, without a checkpoint.
    """

    lending.prepare()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return committed(pgqrs.ledger.database, execution.current(), lambda: function(*args, **kwargs))

    return run


def committed(database: Database, running: Execution | None, body: Callable[[], Any]) -> Any:
    """Return what a body does, executed in a transaction that also commits the success of the step it is."""
    work = lending.begin(database)
    try:
        with work:
            value = body()
    except BaseException:
        work.roll_back()
        raise
    if running is None or running.phase is not Phase.BODY:
        work.commit(lambda session: None)
        return value
    return work.commit(lambda session: checkpoint(session, running, value))


def checkpoint(session: Session, running: Execution, value: Any) -> Any:
    """Write the step's success in the body's own transaction; returns the result as a replay would see it."""
    guard = running.guard
    values = guard.ledger.values
    text = values.dump_result(value, guard.step_id)
    if not steps.succeed(session, guard.task_id, lease_token=guard.lease_token, output=text):
        raise LeaseLost(f"{guard}: finished by or given to another worker")
    running.value = values.load(text)
    running.phase = Phase.SUCCEEDED
    return running.value
