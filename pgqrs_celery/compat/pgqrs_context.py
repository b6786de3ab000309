"""The context of the guides: what steps and workflows get as their first argument."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from pgqrs_celery import inline
from pgqrs_celery.compat.pgqrs_store import Store
from pgqrs_celery.inline import InlineContext, InlineHost
from pgqrs_celery.journal import Journal
from pgqrs_celery.store import inner
from pgqrs_celery.store.consumed import Claim

__all__ = ["PyWorkflow", "StepGuard", "create", "reopen"]


class ClaimHost(InlineHost):
    """A consumer as the place where a function is executed: the run was taken when it was dequeued."""

    def __init__(self, store: Store, claim: Claim) -> None:
        super().__init__(store.ledger, claim.workflow_id, store.outcome)
        self.claim = claim

    def open(self) -> Journal:
        """Read what is recorded; nothing can be written once another consumer has taken the run over."""
        claim = self.claim
        recorded = self.ledger.call(lambda session: inner.load(session, claim.workflow_id, ""))
        return Journal(self.ledger, claim.owner, "", recorded, reserved=claim.step_id, parks=False)


class PyWorkflow(InlineContext):
    """The context of one run, executed in the calling process; its methods return awaitables."""

    def __init__(
        self, store: Store, workflow_id: int, name: str, *, is_async: bool = True, claim: Claim | None = None
    ) -> None:
        super().__init__(store.ledger, workflow_id, name, is_async=is_async, outcome=store.outcome)
        self.store = store
        self._claim = claim
        if claim is not None:
            self._host = ClaimHost(store, claim)

    def renewed(self, *, is_async: bool) -> PyWorkflow:
        """Return a context for another execution of the same run."""
        fresh = type(self)(self.store, self.id, self.name, is_async=is_async, claim=self._claim)
        fresh.executing = True
        return fresh

    @property
    def current_time(self) -> datetime:
        """When the run was dequeued, by the database's clock; for a run that was not dequeued: now."""
        return self._claim.claimed_at if self._claim is not None else datetime.now(UTC)

    def acquire_step(self, name: str, current_time: datetime | None = None) -> Any:
        """Ask for a step; returns an ``AcquiredStep`` with ``status``, ``value`` and ``guard``.

        ``current_time`` is accepted for the guides' sake: what is due is decided by the database's clock.
        """
        if not self.is_async:
            return super().acquire_step(name)
        return self._acquire(name)

    async def _acquire(self, name: str) -> Any:
        await asyncio.to_thread(lambda: self.journal)
        return await super().acquire_step(name)


class StepGuard:
    """The low level without a context: ``await StepGuard.acquire(store, run_id, "step")``."""

    @staticmethod
    async def acquire(store: Store, workflow_id: int, name: str) -> Any:
        """Ask for a step of a run; see ``PyWorkflow.acquire_step``.

        The first step that is asked for takes the run over from whoever executed it before; as long as one of its
        guards is in use, further steps belong to the same execution.
        """
        with store.opening:
            context = store.contexts.get(workflow_id)
        if context is None:
            context = await reopen(store, workflow_id)
            with store.opening:
                context = store.contexts.setdefault(workflow_id, context)
        return await context.acquire_step(name)


async def create(store: Store, name: str, argument: Any = None, *, workflow_key: str | None = None) -> PyWorkflow:
    """Enter a new run and return its context."""
    made = await asyncio.to_thread(inline.create, store.ledger, name, argument, workflow_key=workflow_key)
    return PyWorkflow(store, made.id, name)


async def reopen(store: Store, workflow_id: int) -> PyWorkflow:
    """Return the context of an existing run; raises ``RunNotFound``, ``RunStateError`` if Celery workers have it."""
    found = await asyncio.to_thread(inline.reopen, store.ledger, workflow_id)
    return PyWorkflow(store, workflow_id, found.name)
