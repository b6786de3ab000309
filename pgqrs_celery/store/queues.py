"""Queues and bindings: what was declared, and how exchanges route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from pgqrs_celery.session import Session

__all__ = [
    "Binding",
    "Queue",
    "Swept",
    "bind",
    "bindings",
    "consumers",
    "declare",
    "delete",
    "delete_exchange",
    "deserted",
    "find",
    "holds_messages",
    "sweep",
    "unbind",
]


@dataclass(frozen=True, slots=True)
class Queue:
    """A declared queue; durations are seconds, ``arguments`` is the JSON text of what was asked for.

    A ``volatile`` queue lives and dies with one connection; its messages are in an unlogged table.
    """

    name: str
    volatile: bool
    auto_delete: bool
    arguments: str
    message_ttl: float | None = None
    expires_after: float | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """An exchange routes to a queue; ``pattern`` is a topic's regular expression."""

    exchange: str
    queue: str
    routing_key: str
    kind: str
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A queue as it was declared."""

    name: str
    volatile: bool
    auto_delete: bool
    arguments: str


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found: how many expired messages it removed, and queues that nobody uses any more."""

    expired: int
    deserted: list[str]


def declare(session: Session, queue: Queue) -> None:
    """Enter a queue; a durable one stays durable whatever it is declared as later."""
    session.run(
        "queues.declare",
        {
            "name": queue.name,
            "volatile": queue.volatile,
            "auto_delete": queue.auto_delete,
            "message_ttl": queue.message_ttl,
            "expires_after": queue.expires_after,
            "arguments": queue.arguments,
        },
    )


def find(session: Session, name: str) -> Found | None:
    """Return a queue as it was declared, or None."""
    return session.one(Found, "queues.find", {"name": name})


def holds_messages(session: Session, name: str) -> bool:
    """Return whether there is anything in a queue, leased or not."""
    row = session.row("queues.holds_messages", {"name": name})
    return bool(row and row[0])


def consumers(session: Session, name: str) -> int:
    """Return how many consumers a queue has."""
    row = session.row("queues.consumers", {"name": name})
    return int(row[0]) if row else 0


def delete(session: Session, names: Sequence[str]) -> int:
    """Remove queues with their bindings and messages; return how many messages were thrown away."""
    row = session.row("queues.delete", {"names": list(names)})
    return int(row[0]) if row else 0


def deserted(session: Session, names: Sequence[str], *, besides: UUID | None = None) -> list[str]:
    """Return which of these queues end with their last consumer and have no other one than ``besides``."""
    return [row[0] for row in session.rows("queues.deserted", {"names": list(names), "consumer_id": besides})]


def sweep(session: Session, used: Sequence[str], *, lease: float) -> Swept:
    """Clear away what has expired; say that the queues ``used`` have consumers."""
    found = session.one(Swept, "queues.sweep", {"names": list(used), "lease": lease})
    assert found is not None
    return found


def bind(session: Session, binding: Binding) -> bool:
    """Let an exchange route to a queue; False where it did already."""
    touched = session.run(
        "queues.bind",
        {
            "exchange": binding.exchange,
            "queue": binding.queue,
            "routing_key": binding.routing_key,
            "kind": binding.kind,
            "pattern": binding.pattern,
        },
    )
    return touched > 0


def unbind(session: Session, exchange: str, queue: str, routing_key: str) -> None:
    """End a binding."""
    session.run("queues.unbind", {"exchange": exchange, "queue": queue, "routing_key": routing_key})


def bindings(session: Session, exchange: str | None = None) -> list[tuple[str, str, str]]:
    """Return (queue, exchange, routing key) of all bindings, or of those of one exchange."""
    return [(row[0], row[1], row[2]) for row in session.rows("queues.bindings", {"exchange": exchange})]


def delete_exchange(session: Session, exchange: str) -> None:
    """Remove all bindings of an exchange."""
    session.run("queues.delete_exchange", {"exchange": exchange})
