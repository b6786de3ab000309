"""Messages: the write side of the broker, without a broker's manners.

A message is inserted once (its id is its sender's), leased by one consumer at a time, and deleted when it is
acknowledged. The functions here know nothing of kombu; ``publish`` and ``delete`` may join anybody's transaction.
"""

from __future__ import annotations

import os
import time
from base64 import b64decode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pgqrs_celery.db import SEPARATOR
from pgqrs_celery.session import Params, Session

__all__ = [
    "LONGEST_LOOK",
    "LOOK_INTERVAL",
    "Claimed",
    "Deferred",
    "NewMessage",
    "Published",
    "adopt",
    "bury",
    "claim",
    "deferred",
    "delete",
    "extend",
    "handed",
    "insertion",
    "new_id",
    "post",
    "promote",
    "publication",
    "publish",
    "purge",
    "release",
    "size",
]


#: How often, in seconds, a consumer looks by itself. At 1.25 s a consumer that has nothing to do costs less than one
#: statement per second.
LOOK_INTERVAL: Final = 1.25
#: How often a consumer looks by itself at least, while it has nothing to do and others watch its neighbours for it.
#: Nobody has to be told of a message that is due later than that.
LONGEST_LOOK: Final = 10.0


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be sent; headers and properties are JSON text, ``ttl`` is in seconds.

    With an empty ``exchange`` the routing key is the name of the queue, else the bindings decide.
    """

    message_id: UUID
    exchange: str
    routing_key: str
    headers: str
    properties: str
    body: bytes
    priority: int = 0
    visible_at: datetime | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication put into one queue: how many messages are ready, and when the first of the others is due."""

    queue: str
    volatile: bool
    ready: int
    due_in: float | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A leased message. ``deliveries`` counts this one; ``lost`` counts the consumers that died with it."""

    message_id: UUID
    position: int
    queue: str
    priority: int
    deliveries: int
    lost: int
    headers: str
    properties: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Handed:
    """A message that came with a notification, leased to the consumer that was found asleep in this nap."""

    nap: int
    claimed: Claimed


@dataclass(frozen=True, slots=True)
class Deferred:
    """A message that waits for its ETA."""

    message_id: UUID
    headers: str
    properties: str
    body: bytes


def new_id() -> UUID:
    """Return a random id that begins with the time (as UUID version 7), so that an index grows at its end."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | (0x7 << 76) | int.from_bytes(os.urandom(10), "big") & ~(0xF << 76)
    return UUID(int=value & ~(0x3 << 62) | (0x2 << 62))


def publication(new: Sequence[NewMessage]) -> Params:
    """Return the parameters of the statement ``messages.publish``."""
    return {
        "message_id": [m.message_id for m in new],
        "exchange": [m.exchange for m in new],
        "routing_key": [m.routing_key for m in new],
        "priority": [m.priority for m in new],
        "visible_at": [m.visible_at for m in new],
        "ttl": [m.ttl for m in new],
        "headers": [m.headers for m in new],
        "properties": [m.properties for m in new],
        "body": [m.body for m in new],
    }


def insertion(new: Sequence[NewMessage]) -> tuple[str, Params]:
    """Return the statement that publishes these messages, and its parameters; its rows are ``Published``."""
    if len(new) != 1 or new[0].exchange:
        return "messages.publish", publication(new)
    return "messages.put", _params(new[0])


def _params(new: NewMessage) -> dict[str, Any]:
    return {
        "message_id": new.message_id,
        "routing_key": new.routing_key,
        "priority": new.priority,
        "visible_at": new.visible_at,
        "ttl": new.ttl,
        "headers": new.headers,
        "properties": new.properties,
        "body": new.body,
    }


def post(session: Session, new: NewMessage, *, wake: bool) -> None:
    """Insert one message for the queue its routing key names, commit it, and ``wake`` one who sleeps.

    The message is leased to that consumer and comes with its notification where it fits (``handed``). All in one round
    trip; not inside a transaction: it ends one.
    """
    assert not new.exchange
    given = {"wake": wake, "look_interval": LONGEST_LOOK}
    session.quick_row("messages.post", _params(new) | given)


def handed(payload: str) -> Handed | None:
    """Return the message that came with a notification; None where none did."""
    parts = payload.split(SEPARATOR)
    if len(parts) == 1:
        return None
    nap, message_id, position, queue, priority, deliveries, lost, headers, properties, body = parts
    claimed = Claimed(
        UUID(message_id),
        int(position),
        queue,
        int(priority),
        int(deliveries),
        int(lost),
        headers,
        properties,
        b64decode(body),
    )
    return Handed(int(nap), claimed)


def publish(session: Session, new: Sequence[NewMessage]) -> list[Published]:
    """Insert messages in one statement; repeating it with the same ids changes nothing.

    Nobody is told: call ``consumers.wake`` with the answer *after* the commit.
    """
    name, params = insertion(new)
    return session.many(Published, name, params)


def claim(
    session: Session, consumer_id: UUID, queues: Sequence[str], *, count: int, lease: float, dead: Sequence[UUID] = ()
) -> list[Claimed]:
    """Lease up to ``count`` messages; those of a queue come by priority, then in the order they were sent."""
    rows = session.many(
        Claimed,
        "messages.claim",
        {
            "consumer_id": consumer_id,
            "queues": list(queues),
            "count": count,
            "lease": lease,
            "dead": list(dead),
            "done": [],
            "awake": False,
        },
    )
    return sorted(rows, key=lambda m: (queues.index(m.queue), -m.priority, m.position))


def delete(session: Session, message_ids: Iterable[UUID]) -> list[UUID]:
    """Remove messages whose work is done and return the ids that were still there."""
    return [row[0] for row in session.rows("messages.delete", {"message_ids": list(message_ids)})]


def release(session: Session, consumer_id: UUID, message_ids: Iterable[UUID]) -> list[str]:
    """Give leased messages back and return their queues, one entry for each."""
    given = {"message_ids": list(message_ids), "consumer_id": consumer_id}
    return [row[0] for row in session.rows("messages.release", given)]


def extend(session: Session, consumer_id: UUID, message_ids: Iterable[UUID], *, lease: float) -> set[UUID]:
    """Prolong leases and return the ids that are still the consumer's."""
    given = {"message_ids": list(message_ids), "consumer_id": consumer_id, "lease": lease}
    return {row[0] for row in session.rows("messages.extend", given)}


def adopt(
    session: Session, consumer_id: UUID, formers: Iterable[UUID], message_ids: Iterable[UUID], *, lease: float
) -> set[UUID]:
    """Move leases from the consumers this one was before a lost connection; return what it still has."""
    given: dict[str, Any] = {"message_ids": list(message_ids), "consumer_id": consumer_id, "formers": list(formers)}
    return {row[0] for row in session.rows("messages.adopt", given | {"lease": lease})}


def promote(session: Session, queues: Iterable[str]) -> list[str]:
    """Make a batch of messages ready whose ETA has come; return their queues, one entry for each."""
    return [row[0] for row in session.rows("messages.promote", {"queues": list(queues)})]


def bury(
    session: Session, consumer_id: UUID, buried: Sequence[tuple[UUID, str]], *, queue: str, retention: float | None
) -> int:
    """Move leased messages (id, new headers) to a dead-letter queue, where they are kept for ``retention`` seconds."""
    return session.run(
        "messages.bury",
        {
            "consumer_id": consumer_id,
            "message_id": [message_id for message_id, _ in buried],
            "queue": [queue] * len(buried),
            "headers": [headers for _, headers in buried],
            "retention": retention,
        },
    )


def deferred(session: Session, queues: Iterable[str], *, limit: int) -> list[Deferred]:
    """Return messages that wait for their ETA, those due first."""
    return session.many(Deferred, "messages.deferred", {"queues": list(queues), "limit": limit})


def size(session: Session, queue: str) -> int:
    """Return how many messages wait in a queue, those with an ETA ahead included."""
    row = session.row("messages.size", {"queue": queue})
    return int(row[0]) if row else 0


def purge(session: Session, queue: str) -> int:
    """Remove every message of a queue that nobody has leased, and return how many they were."""
    row = session.row("messages.purge", {"queue": queue})
    return int(row[0]) if row else 0
