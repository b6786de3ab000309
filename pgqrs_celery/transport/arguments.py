"""The arguments a queue is declared with: those this broker knows, and a word about the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from pgqrs_celery.store.queues import Queue
from pgqrs_celery.transport.amqp import precondition_failed
from pgqrs_celery.transport.message import dump

__all__ = ["queue_of"]

logger = logging.getLogger(__name__)

#: Understood, or without meaning here: any number of priorities, one kind of queue, one server.
KNOWN: Final = frozenset(
    {"x-expires", "x-message-ttl", "x-max-priority", "x-queue-type", "x-queue-mode", "x-queue-version", "x-ha-policy"}
)
_told: set[tuple[str, str]] = set()


def queue_of(name: str, arguments: Mapping[str, Any], *, volatile: bool, auto_delete: bool) -> Queue:
    """Return the queue that was asked for; warns once about each argument that has no effect here.

    Raises kombu's ``ChannelError`` for a value that makes no sense.
    """
    for key in arguments.keys() - KNOWN:
        if (name, key) not in _told:
            _told.add((name, key))
            logger.warning("queue %s: the argument %s has no effect on the Postgres broker", name, key)
    return Queue(
        name,
        volatile=volatile,
        auto_delete=auto_delete,
        arguments=dump(dict(arguments)),
        message_ttl=_seconds(name, arguments, "x-message-ttl"),
        expires_after=_seconds(name, arguments, "x-expires"),
    )


def _seconds(name: str, arguments: Mapping[str, Any], key: str) -> float | None:
    value = arguments.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise precondition_failed(
            f"queue {name!r}: {key} is {value!r}, it must be a number of milliseconds", "Channel.queue_declare"
        )
    return value / 1000
