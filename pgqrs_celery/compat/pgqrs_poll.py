"""How consumers are made, and polling: one that executes a function for whatever it dequeues."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pgqrs_celery.compat.pgqrs_consumer import Consumer, Message
from pgqrs_celery.compat.pgqrs_context import PyWorkflow
from pgqrs_celery.compat.pgqrs_decorators import InlineWorkflow
from pgqrs_celery.compat.pgqrs_store import Store
from pgqrs_celery.exceptions import ConfigurationError, LeaseLost

__all__ = ["ConsumerBuilder", "Poller", "consumer"]

logger = logging.getLogger(__name__)


def as_workflow(function: Callable[..., Any]) -> InlineWorkflow:
    """Return a handler as a workflow; a function that is not decorated is taken as if it were."""
    return function if isinstance(function, InlineWorkflow) else InlineWorkflow(function)


@dataclass(frozen=True, slots=True)
class Poller:
    """A consumer and the function it executes, with the run's context and its input."""

    consumer: Consumer
    workflow: InlineWorkflow

    async def poll(self, store: Store | None = None) -> None:
        """Execute what comes until the task is cancelled; a run that is being executed then goes back to the queue.

        A function that raises makes its run FAILED, and the loop goes on.
        """
        if store is not None and store is not self.consumer.store:
            raise ConfigurationError(f"{self.consumer!r} was created on another store than the one it is to poll")
        while True:
            for message in await self.consumer.dequeue():
                await self.handle(message)

    async def handle(self, message: Message) -> None:
        """Execute one run that was dequeued."""
        context = PyWorkflow(self.consumer.store, message.id, message.claim.name, claim=message.claim)
        try:
            if inspect.iscoroutinefunction(self.workflow.function):
                await self.workflow(context, message.payload)
            else:
                await asyncio.to_thread(self.workflow, context, message.payload)
        except asyncio.CancelledError:
            await asyncio.shield(self.consumer.release(message.id))
            raise
        except LeaseLost as lost:
            logger.warning("run %s: %s", message.id, lost)
        except Exception:
            logger.exception("run %s of %r failed", message.id, self.workflow.name)
        finally:
            # One that has not ended after all (the database was away) is delivered again when its lease is over.
            self.consumer.let_go(message.id)


@dataclass(frozen=True, slots=True)
class ConsumerBuilder:
    """``consumer(name, port, queue)``: nothing happens before ``create``."""

    name: str
    port: int
    queue: str

    async def create(self, store: Store, *, lease: float | None = None) -> Consumer:
        """Return the consumer; ``lease`` is how many seconds it may be silent before others get what it has."""
        if lease is not None and lease <= 0:
            raise ConfigurationError(f"consumer {self.name!r}: a lease must be longer than {lease} seconds")
        return Consumer(store, self.name, self.port, self.queue, lease or store.ledger.settings.lease)

    def handler(self, function: Callable[..., Any]) -> PollerBuilder:
        """Let the consumer execute a function, of the run's context and its input, for what it dequeues."""
        return PollerBuilder(self, as_workflow(function))


@dataclass(frozen=True, slots=True)
class PollerBuilder:
    """A consumer with its handler: nothing happens before ``create``."""

    consumer: ConsumerBuilder
    workflow: InlineWorkflow

    async def create(self, store: Store, *, lease: float | None = None) -> Poller:
        """Return what is to be polled."""
        return Poller(await self.consumer.create(store, lease=lease), self.workflow)


def consumer(name: str, port: int, queue: str) -> ConsumerBuilder:
    """Describe a consumer: its name and port are for people, the queue is the workflow's name."""
    return ConsumerBuilder(name, port, queue)
