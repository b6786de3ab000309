"""Consumers: who listens, who sleeps, who has died."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pgqrs_celery.session import Params, Session
from pgqrs_celery.store.messages import LONGEST_LOOK, Published

__all__ = [
    "Sight",
    "channel",
    "doze",
    "hail",
    "lock",
    "lock_key",
    "register",
    "remove",
    "tell",
    "touch",
    "wake",
    "wake_up",
    "watch",
]


@dataclass(frozen=True, slots=True)
class Sight:
    """What a consumer sees when it looks around.

    ``ready``: there is something to claim; ``arrived``: a volatile queue has a message; ``due_in``: seconds to the next
    ETA; ``dead``: consumers whose leases are void; ``suspects``: those whose session lock was free just now;
    ``shared``: somebody else consumes the same queues; ``registered``: the consumer's own row is there;
    ``bound``: exchanges with at least one binding; ``watched``: whoever could be missed here is a worker that is
    watched as such, so that the consumer may look rarely while it has nothing to do.
    """

    ready: bool
    arrived: bool
    due_in: float | None
    dead: list[UUID]
    suspects: list[UUID]
    shared: bool
    registered: bool
    bound: list[str]
    watched: bool


#: Neighbours whose locks a look tries, in ring order.
NEAR: Final = 3
#: All of them, in a fleet of any reasonable size.
ALL: Final = 1000


def lock_key(consumer_id: UUID) -> int:
    """Return the advisory lock key of a consumer: the last 64 bits of its id."""
    return int.from_bytes(consumer_id.bytes[8:], "big", signed=True)


def channel(consumer_id: UUID) -> str:
    """Return the name of the channel a consumer listens on."""
    return f"pgqrs_{consumer_id.hex}"


def lock(session: Session, consumer_id: UUID) -> None:
    """Take the consumer's lock for as long as the session lives: the others see by it that the consumer does."""
    session.row("consumers.lock", {"key": lock_key(consumer_id)})


def register(
    session: Session,
    consumer_id: UUID,
    *,
    queues: Sequence[str],
    hostname: str,
    pid: int,
    locked: bool,
    lease: float,
    formers: Sequence[UUID] = (),
) -> None:
    """Enter a consumer or change its queues; ``formers`` are whom it has been, or tried to be, before.

    What is handed to it while it sleeps is leased for ``lease`` seconds.

    The other consumers of these queues are told to look: they have somebody to share with, and to watch.
    """
    session.run(
        "consumers.register",
        {
            "consumer_id": consumer_id,
            "lock_key": lock_key(consumer_id) if locked else None,
            "hostname": hostname,
            "pid": pid,
            "queues": list(queues),
            "lease": lease,
            "formers": list(formers),
        },
    )


def remove(session: Session, consumer_id: UUID, *, leasing: bool) -> None:
    """Remove a consumer that ended as it should, having given back what it had.

    One that was ``leasing`` may have been handed a message since: it counts as dead, and others take that.
    """
    session.run("consumers.remove", {"consumer_id": consumer_id, "leasing": leasing})


def doze(session: Session, consumer_id: UUID, queues: Sequence[str], nap: int) -> bool:
    """Say that the consumer wants to be notified; return whether there is something to do after all.

    What is handed to it says in which ``nap`` it was found, by the consumer's own count.
    """
    row = session.row("consumers.doze", {"consumer_id": consumer_id, "queues": list(queues), "nap": nap})
    return bool(row and row[0])


def wake(session: Session, published: Iterable[Published], *, besides: UUID | None = None) -> int:
    """After a publication's commit: notify those who sleep and are needed; return how many they were."""
    params = wake_up(published, besides=besides)
    if params is None:
        return 0
    row = session.row("consumers.wake", params)
    return int(row[0]) if row else 0


def wake_up(published: Iterable[Published], *, besides: UUID | None = None) -> Params | None:
    """Return the parameters of the statement ``consumers.wake``, None where nobody has to be woken."""
    ready: dict[str, int] = {}
    looks: list[dict[str, str]] = []
    for entry in published:
        if entry.ready:
            ready[entry.queue] = ready.get(entry.queue, 0) + entry.ready
        if entry.volatile:
            looks.append({"queue": entry.queue, "payload": "arrived"})
        if entry.due_in is not None and entry.due_in < LONGEST_LOOK:
            looks.append({"queue": entry.queue, "payload": "look"})
    if not ready and not looks:
        return None
    counts = [{"queue": queue, "ready": count} for queue, count in ready.items()]
    return {"ready": json.dumps(counts), "looks": json.dumps(looks), "besides": besides}


def tell(session: Session, queues: Sequence[str]) -> None:
    """Notify every consumer of these queues when the session's transaction commits."""
    session.run("consumers.tell", {"queues": list(queues)})


def hail(session: Session) -> None:
    """Tell every consumer to look: somebody listens to an exchange that perhaps nobody listened to before."""
    session.row("consumers.hail")


def touch(session: Session, consumer_id: UUID) -> None:
    """Note that a consumer lives; comes before its ``watch``."""
    session.run("consumers.touch", {"consumer_id": consumer_id})


def watch(
    session: Session,
    consumer_id: UUID,
    *,
    queues: Sequence[str],
    volatile: Sequence[str],
    suspects: Sequence[UUID],
    judge: bool,
    settled: bool = False,
    wide: bool = False,
    watched_apps: Sequence[str] = (),
) -> Sight:
    """Look around: is there work, what is due next, who has died.

    A neighbour is dead whose session lock was free on two looks. After a restart of the server every lock is free:
    those who registered before it are judged only where ``judge`` says so, once the consumer's own session is older
    than a lease; the others where it is ``settled``, and cannot have lost its session together with them.
    A ``wide`` look tries everybody's lock and not just those of the next few. ``watched_apps`` are those whose workers
    somebody else in this process watches. Whoever is found dead, the other consumers of its queues are told to look.
    """
    found = session.one(
        Sight,
        "consumers.watch",
        {
            "consumer_id": consumer_id,
            "queues": list(queues),
            "volatile": list(volatile),
            "suspects": list(suspects),
            "judge": judge,
            "settled": settled,
            "near": ALL if wide else NEAR,
            "apps": list(watched_apps),
        },
    )
    assert found is not None
    return found
