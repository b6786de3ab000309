"""Administration: the schema, and runs that the calling process executes."""

from __future__ import annotations

from typing import Any

from pgqrs_celery.compat import pgqrs_context
from pgqrs_celery.compat.pgqrs_context import PyWorkflow
from pgqrs_celery.compat.pgqrs_store import Store

__all__ = ["Admin", "admin"]


class Admin:
    """``Admin(dsn, schema)``, or ``Admin(store)``; connects when it is first used."""

    def __init__(self, dsn: str | Store, schema: str | None = None) -> None:
        self.store = dsn if isinstance(dsn, Store) else Store(dsn, schema)

    async def install(self) -> list[str]:
        """Install or upgrade the schema; safe to repeat. Returns the names of the migrations applied."""
        return await self.store.install()

    async def create_workflow(self, name: str, argument: Any = None, *, workflow_key: str | None = None) -> PyWorkflow:
        """Enter a new run and return its context, with which a ``@workflow`` function executes it.

        With a ``workflow_key`` that a run has already, the context is that run's.
        """
        return await pgqrs_context.create(self.store, name, argument, workflow_key=workflow_key)

    async def get_workflow(self, workflow_id: int) -> PyWorkflow:
        """Return the context of an existing run, in whatever process; raises ``RunNotFound``."""
        return await pgqrs_context.reopen(self.store, workflow_id)


def admin(store: Store) -> Admin:
    """Return the administration of a connected store."""
    return Admin(store)
