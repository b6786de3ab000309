"""The databases of a process: one ``Database`` per place and settings, whoever asks for it."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from pgqrs_celery import embedded
from pgqrs_celery.conf import DSN_VARIABLE, Settings
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import ConfigurationError, EmbeddedUnavailable

__all__ = ["database_for"]

logger = logging.getLogger(__name__)

_databases: dict[tuple[Any, ...], Database] = {}
_lock = threading.Lock()


def database_for(dsn: str, settings: Settings) -> Database:
    """Return the process's database for a DSN and settings: ledger, result backend and broker share connections.

    However the DSN is spelt; an empty one stands for ``pgqrs_dsn``, ``PGQRS_CELERY_DSN``, or an embedded server that is
    started at first use and has its schema installed. Raises ``ConfigurationError`` where the DSN cannot be read.
    """
    dsn = dsn or settings.dsn or os.environ.get(DSN_VARIABLE) or ""
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(f"the DSN cannot be read: {error}") from None
    key = (
        dsn == "",
        frozenset({"port": os.environ.get("PGPORT", "5432"), **parts}.items()),
        settings.schema,
        settings.pool_size,
        settings.connect_timeout,
        settings.prepared_statements,
        settings.synchronous_commit,
    )
    with _lock:
        if key not in _databases:
            _databases[key] = Database(
                dsn or _embedded_dsn,
                schema=settings.schema,
                pool_size=settings.pool_size,
                connect_timeout=settings.connect_timeout,
                prepared_statements=settings.prepared_statements,
                synchronous_commit=settings.synchronous_commit,
                auto_install=not dsn,
            )
        database = _databases[key]
        database.auto_install = database.auto_install or settings.auto_install
        # Who is silent for a lease is taken for lost: nobody may keep the locks of his transaction for longer.
        database.silence = min(database.silence, settings.lease)
        return database


def _embedded_dsn() -> str:
    """Return the DSN of an embedded server; raises ``ConfigurationError`` where there is none to be had."""
    try:
        dsn = embedded.ensure_postgres()
    except EmbeddedUnavailable as error:
        raise ConfigurationError(f"no database: set pgqrs_dsn or {DSN_VARIABLE} ({error})") from error
    logger.info("neither pgqrs_dsn nor %s is set: using an embedded Postgres", DSN_VARIABLE)
    return dsn


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have held it
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
