"""Fixtures of the store's tests: an installed schema, and a ledger on a clock that stands still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgqrs_celery.db import Database
from tests.support.ledger import Ledger


@pytest.fixture
def database(database_dsn: str, installed_schema: str) -> Iterator[Database]:
    """A database with the schema installed."""
    database = Database(database_dsn, schema=installed_schema)
    yield database
    database.close()


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    """A ledger whose clock stands still until the test moves it."""
    ledger = Ledger(database)
    ledger.stop_clock()
    yield ledger
    ledger.close()


@pytest.fixture
def live_ledger(database: Database) -> Iterator[Ledger]:
    """A ledger on the real clock."""
    ledger = Ledger(database)
    yield ledger
    ledger.close()
