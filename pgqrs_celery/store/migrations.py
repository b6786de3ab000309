"""The schema: numbered SQL files, a checksummed ledger of those applied, safe when many processes start at once.

Files are ``store/sql/migrations/NNNN_name.sql``; one with ``.concurrently.`` in its name runs outside a transaction
and must be idempotent. The lock is polled: a process that blocks inside ``pg_advisory_lock()`` holds a snapshot, and
``CREATE INDEX CONCURRENTLY`` in the process that has the lock would wait for that snapshot for ever.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, cast

from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import NotInstalled, SchemaOutdated
from pgqrs_celery.session import Session
from pgqrs_celery.store.statements import quote_identifier

__all__ = ["Migration", "applied", "available", "install", "script", "verify"]

logger = logging.getLogger(__name__)

INSTALL = "`celery -A your_app pgqrs install` (or Pgqrs(app).install())"


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """The SHA-256 of the file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def in_transaction(self) -> bool:
        """Whether the file runs in one transaction with its ledger entry."""
        return ".concurrently." not in self.name

    def rendered(self, schema: str) -> str:
        """Return the text for one schema."""
        return self.text.replace("{schema}", quote_identifier(schema))


@cache
def available() -> tuple[Migration, ...]:
    """Return the migrations this version of the package brings, in order."""
    folder = resources.files("pgqrs_celery.store").joinpath("sql", "migrations")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return tuple(Migration(int(f.name[:4]), f.name, f.read_text("utf-8")) for f in files)


def applied(session: Session) -> dict[int, str]:
    """Return the checksums of the applied migrations by version; empty where nothing is installed."""
    found = session.row("migrations.table_exists")
    if not found or not found[0]:
        return {}
    return {int(version): str(checksum) for version, checksum in session.rows("migrations.applied")}


def verify(database: Database) -> None:
    """Raise ``NotInstalled`` or ``SchemaOutdated``, saying what to run, unless the schema is this version's."""
    have = database.call(applied)
    if not have:
        raise NotInstalled(f"schema {database.schema!r} holds no pgqrs tables; run {INSTALL}")
    missing = [m.name for m in available() if m.version not in have]
    if missing:
        raise SchemaOutdated(f"schema {database.schema!r} lacks {', '.join(missing)}; run {INSTALL}")
    _check(have, database.schema)


def _check(have: dict[int, str], schema: str) -> None:
    for migration in available():
        if have.get(migration.version, migration.checksum) != migration.checksum:
            raise SchemaOutdated(
                f"migration {migration.name} in schema {schema!r} is not the file of this version: it was changed "
                "after it was applied; restore the release it was installed with"
            )


def install(database: Database) -> list[str]:
    """Apply what is missing and return the names of the files applied; takes no lock when all are there."""
    have = database.call(applied)
    if have.keys() >= {m.version for m in available()}:
        _check(have, database.schema)
        return []
    with database.session() as session:
        lock = {"key": _lock_key(database.schema)}
        pause = threading.Event()
        while not cast("tuple[Any]", session.row("migrations.try_lock", lock))[0]:
            pause.wait(0.1)
        try:
            session.run("migrations.create_schema")
            session.run("migrations.create_table")
            return _apply(session, database.schema)
        finally:
            session.row("migrations.unlock", lock)


def _apply(session: Session, schema: str) -> list[str]:
    have = applied(session)
    _check(have, schema)
    done = []
    for migration in available():
        if migration.version in have:
            continue
        entry = {"version": migration.version, "name": migration.name, "checksum": migration.checksum}
        if migration.in_transaction:
            with session.connection.transaction():
                session.connection.execute("SET LOCAL lock_timeout = '10s'")
                session.connection.execute(cast("Any", migration.rendered(schema)))
                session.run("migrations.record", entry)
        else:
            session.connection.execute(cast("Any", migration.rendered(schema)))
            session.run("migrations.record", entry)
        logger.info("schema %s: applied %s", schema, migration.name)
        done.append(migration.name)
    return done


def script(schema: str) -> str:
    """Return everything ``install`` would run on an empty database, as a script for ``psql``."""
    quoted = quote_identifier(schema)
    parts = [
        f"CREATE SCHEMA IF NOT EXISTS {quoted};",
        f"CREATE TABLE IF NOT EXISTS {quoted}.pgqrs_migrations (version int PRIMARY KEY, name text NOT NULL, "
        "checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now());",
    ]
    for migration in available():
        entry = (
            f"INSERT INTO {quoted}.pgqrs_migrations (version, name, checksum) "
            f"VALUES ({migration.version}, '{migration.name}', '{migration.checksum}');"
        )
        body = [migration.rendered(schema).rstrip(), entry]
        parts += ["BEGIN;", *body, "COMMIT;"] if migration.in_transaction else body
    return "\n\n".join(parts) + "\n"


def _lock_key(schema: str) -> int:
    digest = hashlib.sha256(f"pgqrs migrations {schema}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
