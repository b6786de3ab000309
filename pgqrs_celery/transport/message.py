"""Messages between kombu's form and the table's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from kombu.message import Message as KombuMessage
from kombu.utils.json import JSONEncoder
from kombu.utils.json import loads as kombu_loads

from pgqrs_celery.store.messages import NewMessage, new_id

__all__ = ["Message", "dump", "load", "outgoing"]

#: Seconds for which a task that has expired is still delivered: the worker stores REVOKED, where a broker that drops
#: it would leave the caller waiting.
EXPIRED_TASK_GRACE: Final = 86400.0
#: AMQP's range; Celery uses 0 to 9.
MAX_PRIORITY: Final = 255
#: Where a publish that failed leaves its message id, so that the next attempt is no duplicate. Never sent.
UNCONFIRMED: Final = "_pgqrs_unconfirmed"

#: AMQP's message properties, and those this broker adds.
PROPERTIES: Final = frozenset(
    {
        *("content_type", "content_encoding", "delivery_mode", "priority", "correlation_id", "reply_to", "expiration"),
        *("message_id", "timestamp", "type", "user_id", "app_id", "cluster_id", "delivery_info"),
    }
)

_encode = JSONEncoder(separators=(",", ":")).encode


def dump(value: Any) -> str:
    """Return the value as JSON text; dates, UUIDs and decimals survive as kombu writes them."""
    return _encode(value)


def load(text: str) -> Any:
    """Return what ``dump`` wrote."""
    return kombu_loads(text) if '"__' in text else json.loads(text)


def outgoing(message: Mapping[str, Any], exchange: str, routing_key: str) -> NewMessage:
    """Return the message as the table takes it; a task's ETA becomes the message's own, too."""
    headers: dict[str, Any] = dict(message["headers"])
    properties: dict[str, Any] = {k: v for k, v in message["properties"].items() if v is not None}
    body = message["body"]
    unconfirmed = headers.pop(UNCONFIRMED, None)
    is_task = "task" in headers
    ttl = _seconds(properties.get("expiration"))
    if ttl is not None and is_task and headers.get("expires"):
        ttl += EXPIRED_TASK_GRACE
    properties |= {
        "content_type": message["content-type"],
        "content_encoding": message["content-encoding"],
        "delivery_info": {"exchange": exchange, "routing_key": routing_key},
    }
    return NewMessage(
        message_id=unconfirmed[1] if unconfirmed and unconfirmed[0] == hash(body) else new_id(),
        exchange=exchange,
        routing_key=routing_key,
        headers=dump(headers),
        properties=_dump_properties(properties),
        body=body.encode() if isinstance(body, str) else bytes(body),
        priority=_priority(properties.get("priority")),
        visible_at=_moment(headers["eta"]) if is_task and headers.get("eta") else None,
        ttl=ttl,
    )


def _dump_properties(properties: dict[str, Any]) -> str:
    try:
        return dump(properties)
    except TypeError:  # something that was passed on by accident; AMQP has no place for it either
        return dump({key: value for key, value in properties.items() if key in PROPERTIES})


def _moment(value: Any) -> datetime | None:
    # A time without a zone is the receiving app's local time: only the worker can read it.
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def _seconds(expiration: Any) -> float | None:
    try:
        return max(0.0, int(expiration) / 1000)
    except (TypeError, ValueError):
        return None


def _priority(value: Any) -> int:
    try:
        return min(max(int(value), 0), MAX_PRIORITY)
    except (TypeError, ValueError):
        return 0


class DueHeaders(dict[str, Any]):
    """The headers of a task whose ETA has come: they have it, but the worker's question for it is answered with None.

    Celery's worker asks ``headers.get("eta")`` and, given one, holds the task in memory with a timer and raises its
    prefetch count. A message of ours arrives when it is due, so there is nothing to wait for. ``request.eta`` in the
    task is what was sent, in every pool.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """Return a header, but no ETA."""
        return None if key == "eta" else super().get(key, default)

    def copy(self) -> DueHeaders:
        """Return a copy of the same kind."""
        return DueHeaders(self)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, ({**self},)


def _delivered(headers: dict[str, Any]) -> dict[str, Any]:
    # An ETA without a zone was not understood by ``outgoing``; it is left to the worker.
    if headers.get("eta") and "task" in headers and _moment(headers["eta"]) is not None:
        return DueHeaders(headers)
    return headers


class Message(KombuMessage):
    """A delivered message. One that cannot be decoded is buried where it would be acknowledged or dropped."""

    def __init__(self, channel: Any, tag: str, headers: str, properties: str, body: bytes, **info: Any) -> None:
        found = load(properties)
        found["delivery_tag"] = tag
        self.undecodable: str | None = None
        raw: Any = body
        super().__init__(
            body=raw,
            channel=channel,
            delivery_tag=tag,
            content_type=found.get("content_type"),
            content_encoding=found.get("content_encoding"),
            delivery_info={**found.get("delivery_info", {}), "priority": found.get("priority"), **info},
            properties=found,
            headers=_delivered(load(headers)),
        )

    def decode(self) -> Any:
        """Deserialize the body."""
        try:
            return super().decode()
        except Exception as error:
            self.undecodable = repr(error)
            raise

    def _reraise_error(self, callback: Any = None) -> None:
        self.undecodable = repr(self.errors[0][1]) if self.errors else "unknown"
        super()._reraise_error(callback)

    def ack(self, multiple: bool = False) -> None:
        """Acknowledge the message; one that could not be decoded goes to the dead-letter queue instead."""
        if self.undecodable is not None:
            self.reject()
        else:
            super().ack(multiple=multiple)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message."""
        if self.undecodable is not None and not requeue and not self.acknowledged and self.channel is not None:
            self.channel.bury(self.delivery_tag, self.undecodable)
            self._state = "REJECTED"
        else:
            super().reject(requeue=requeue)
