"""Connections to the broker, as somebody has them who must not be kept waiting and tries again by himself."""

from __future__ import annotations

from typing import Any, Final

from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError

__all__ = ["broker_errors", "connect_once"]

#: Seconds after which a broker that does not answer counts as gone.
SILENCE: Final = 5.0

#: How kombu's transports call that, by the kind of broker.
TIMEOUTS: Final = {
    "redis": ("socket_timeout", "socket_connect_timeout"),
    "amqp": ("read_timeout", "write_timeout"),
}


def connect_once(app: Celery) -> Connection:
    """Return a new connection to the app's broker, not opened yet, that tries once, and not for long.

    By default kombu tries for ever, and waits for ever for a broker that has vanished without a word.
    """
    connection = app.connection_for_write()
    names = TIMEOUTS.get(connection.get_transport_cls().driver_type, ())
    connection.transport_options = {
        **dict.fromkeys(names, SILENCE),
        **(connection.transport_options or {}),
        "max_retries": 0,
    }
    return connection


def broker_errors(producer: Any) -> tuple[type[BaseException], ...]:
    """Return the exceptions by which a broker says that it is away."""
    connection = getattr(producer, "connection", None)
    own = (*connection.connection_errors, *connection.channel_errors) if connection is not None else ()
    return (OperationalError, OSError, *own)
