"""Consumers: processes that take triggered runs from the ledger and execute them, without Celery.

What a consumer has dequeued is leased; a thread renews the leases as long as the process lives. A consumer that dies
keeps nothing: after one lease another consumer gets the run, and what the dead one still writes is refused.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from pgqrs_celery.compat.pgqrs_store import Store
from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.store import consumed
from pgqrs_celery.store.consumed import Claim

__all__ = ["Consumer", "Message"]

logger = logging.getLogger(__name__)

#: How long ``dequeue`` waits for a run where there is none, and how often it looks meanwhile, in seconds.
PATIENCE: Final = 1.0
FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.2


@dataclass(frozen=True, slots=True)
class Message:
    """A run that was dequeued; its id is the run's."""

    id: int
    payload: Any
    claim: Claim

    @property
    def attempt(self) -> int:
        """How many times the run has been dequeued, this time included."""
        return self.claim.attempt


class Consumer:
    """A consumer of one workflow's queue."""

    def __init__(self, store: Store, name: str, port: int, queue: str, lease: float) -> None:
        self.store = store
        self.name = name
        self.port = port
        self.queue = queue
        self.lease = lease
        self.worker_id = uuid4()
        self._held: dict[int, Claim] = {}
        self._lock = threading.Lock()
        self._keeper: threading.Thread | None = None
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"<Consumer {self.name!r} of {self.queue!r}>"

    async def dequeue(self, batch_size: int = 1, timeout: float = PATIENCE) -> list[Message]:
        """Take up to ``batch_size`` runs; empty where none came within ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + timeout, FIRST_PAUSE
        while not (claims := await self._claim(batch_size)):
            left = deadline - loop.time()
            if left <= 0:
                return []
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, LONGEST_PAUSE)
        self._keep(claims)
        values = self.store.ledger.values
        return [Message(one.workflow_id, values.load(one.input), one) for one in claims]

    async def _claim(self, batch_size: int) -> list[Claim]:
        ledger = self.store.ledger
        return await self.store.call(
            lambda session: consumed.claim(
                session,
                app=ledger.app,
                queue=self.queue,
                worker_id=self.worker_id,
                batch=batch_size,
                lease=self.lease,
                max_lost=ledger.settings.max_lost,
                poison=ledger.poison,
            )
        )

    async def archive(self, message_id: int) -> bool:
        """Say that a dequeued run is done with: it is never delivered again. False where it is not this consumer's."""
        claim = self.let_go(message_id)
        if claim is None:
            return False
        return await self.store.call(lambda session: consumed.archive(session, claim.owner))

    async def release(self, message_id: int) -> bool:
        """Give a dequeued run back to the queue, for any consumer. False where it is not this consumer's any more."""
        claim = self.let_go(message_id)
        if claim is None:
            return False
        return await self.store.call(lambda session: consumed.release(session, claim.owner))

    async def close(self) -> None:
        """Give back what is still held, and stop renewing."""
        with self._lock:
            held = list(self._held)
        for message_id in held:
            await self.release(message_id)
        self._stop.set()

    def let_go(self, message_id: int) -> Claim | None:
        """Renew the lease of a run no longer; returns what was held, None where nothing was."""
        with self._lock:
            return self._held.pop(message_id, None)

    def _keep(self, claims: list[Claim]) -> None:
        with self._lock:
            self._held.update((one.workflow_id, one) for one in claims)
            if self._keeper is None:
                # The thread must not keep a consumer that nobody uses any more, and its runs, alive.
                keeper = threading.Thread(
                    target=keep, args=(weakref.ref(self), self._stop), name=f"pgqrs-keeper-{self.name}", daemon=True
                )
                self._keeper = keeper
                keeper.start()

    def renew(self) -> None:
        """Renew the leases of what is held; what belongs to others by now is dropped."""
        with self._lock:
            held = list(self._held.values())
        if not held:
            return
        own = self.store.ledger.call(lambda session: consumed.renew(session, held, lease=self.lease))
        with self._lock:
            for claim in held:
                if claim.task_id not in own and self._held.get(claim.workflow_id) is claim:
                    del self._held[claim.workflow_id]


def keep(reference: weakref.ref[Consumer], stop: threading.Event) -> None:
    """Renew a consumer's leases until it is gone."""
    while True:
        consumer = reference()
        if consumer is None:
            return
        pause = consumer.lease / 3
        del consumer
        if stop.wait(pause):
            return
        consumer = reference()
        try:
            if consumer is not None:
                consumer.renew()
        except StoreError as error:
            logger.warning("the leases of %r could not be renewed: %s", consumer, error)
        del consumer
