"""Servers for demos, tests and single machines: Postgres and Redis without an installation or a container.

``dsn()`` is the short form: the database named by ``PGQRS_CELERY_DSN``, else an embedded Postgres that is
started when first asked for, shared by the processes of this user, and stopped when the last of them is gone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.embedded.account import new_directory
from pgqrs_celery.embedded.binaries import BINDIR_VARIABLE, find_postgres
from pgqrs_celery.embedded.postgres import HOME_VARIABLE, PostgresServer, default_directory
from pgqrs_celery.embedded.redis import RedisServer, find_redis, redis_server

__all__ = [
    "BINDIR_VARIABLE",
    "HOME_VARIABLE",
    "PostgresServer",
    "RedisServer",
    "default_directory",
    "dsn",
    "ensure_postgres",
    "find_postgres",
    "find_redis",
    "new_directory",
    "postgres",
    "redis_server",
]

# Leases of `ensure_postgres`, which last until the process ends.
_kept: dict[Path, PostgresServer] = {}


def postgres(
    data_dir: Path | None = None,
    *,
    bindir: Path | None = None,
    settings: Mapping[str, str] | None = None,
    idle: float = 5.0,
) -> PostgresServer:
    """Start, or join, the Postgres in ``data_dir`` (default: the user's shared one) and return its handle.

    The handle holds a lease until ``release()``, the end of its ``with`` block, or the end of the process.
    ``settings`` are server settings such as ``{"max_connections": "300", "fsync": "off"}``; ``bindir``
    chooses the binaries. Raises `EmbeddedUnavailable` with the reason where no server can run.
    """
    directory = data_dir if data_dir is not None else default_directory() / "postgres"
    return PostgresServer(directory, bindir=bindir, settings=settings, idle=idle).start()


def ensure_postgres(data_dir: Path | None = None) -> str:
    """The DSN of the embedded Postgres, which runs when this returns and as long as this process does.

    Called again it is cheap, and starts the server anew if it was killed: call it before every connection.
    """
    directory = (data_dir if data_dir is not None else default_directory() / "postgres").absolute()
    server = _kept.get(directory)
    if server is None:
        server = _kept.setdefault(directory, PostgresServer(directory))
    return server.start().dsn()


def dsn() -> str:
    """``PGQRS_CELERY_DSN`` if it is set, else `ensure_postgres`."""
    return os.environ.get(DSN_VARIABLE) or ensure_postgres()
