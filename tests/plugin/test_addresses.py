"""One database, however its address is written."""

from __future__ import annotations

import pytest
from celery import Celery

from pgqrs_celery import Pgqrs
from pgqrs_celery.conf import Settings
from pgqrs_celery.databases import database_for
from pgqrs_celery.joint import shares_ledger


@pytest.mark.parametrize(
    "spelling",
    [
        "postgresql://shop@db/shop?sslmode=require&application_name=a%20b",
        "postgres://shop@db/shop?application_name=a%20b&sslmode=require",
        "dbname=shop application_name='a b' user=shop host=db sslmode=require",
    ],
)
def test_two_spellings_of_one_address_share_connections(spelling: str) -> None:
    first = database_for("postgresql://shop@db/shop?sslmode=require&application_name=a%20b", Settings())
    assert database_for(spelling, Settings()) is first


def test_results_named_by_url_are_in_the_ledger_named_by_dsn(database_dsn: str, schema: str) -> None:
    assert "host=/" in database_dsn  # which is host=%2F… once a URL has been taken apart and put together
    app = Celery("shop", backend=f"pgqrs+{database_dsn}", set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=schema)
    pgqrs = Pgqrs(app)
    assert shares_ledger(app.backend, pgqrs.ledger)
