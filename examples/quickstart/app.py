"""The app: what you would write. Three Celery tasks, made durable by their decorator.

Broker, results and ledger are one Postgres: that of ``PGQRS_CELERY_DSN``, or else an embedded one.
``CELERY_BROKER_URL`` names another broker.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from pgqrs_celery import Pgqrs

app = Celery("examples.quickstart.app", broker="pgqrs://", backend="pgqrs://")
pgqrs = Pgqrs(app)


class TerminalBusy(Exception):
    """The card terminal wants to be asked again."""


@pgqrs.task
def reserve(order: int) -> dict[str, Any]:
    """Put the goods aside."""
    return {"order": order, "items": ["book", "lamp"]}


@pgqrs.task(bind=True, autoretry_for=(TerminalBusy,), default_retry_delay=0)
def charge(self: Any, reservation: dict[str, Any]) -> dict[str, Any]:
    """Charge the card; the terminal is busy the first time, and Celery's own retry applies."""
    if self.request.retries == 0:
        raise TerminalBusy("in use")
    return {**reservation, "paid": True}


@pgqrs.task
def ship(receipt: dict[str, Any]) -> str:
    """Send the parcel."""
    return f"parcel-{receipt['order']}"


fulfil = pgqrs.workflow("fulfil", reserve.s() | charge.s() | ship.s())
