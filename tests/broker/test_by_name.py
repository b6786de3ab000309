"""The broker chosen by ``broker_transport``: with any URL, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from pgqrs_celery import Pgqrs
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.joint import own_broker
from pgqrs_celery.transport import Transport

NAME = "pgqrs_celery.transport:Transport"
ROOT = Path(__file__).parents[2]

#: Sends a task without an import of ours.
SENDER = """
import os, sys
from celery import Celery
app = Celery("sender", broker=sys.argv[1] or None)
app.conf.broker_transport = "pgqrs_celery.transport:Transport"
app.conf.broker_transport_options = {"schema": sys.argv[2]}
app.send_task("t", (1,))
with app.connection_for_write() as connection:
    print(connection.default_channel.queue_declare("celery", passive=True).message_count, connection.as_uri())
"""


@pytest.mark.parametrize("url", ["", "pgqrs://", "{dsn}"])
def test_a_sender_needs_no_import(url: str, database_dsn: str, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("owner", broker="pgqrs://", set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=schema)
    Pgqrs(app).install()
    monkeypatch.setenv(DSN_VARIABLE, database_dsn)
    url = url.format(dsn=database_dsn)
    sent = subprocess.run(
        [sys.executable, "-c", SENDER, url, schema], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert sent.returncode == 0, sent.stderr
    count, shown = sent.stdout.split()
    assert count == "1"
    assert shown.startswith(url or "pgqrs://")


@pytest.mark.parametrize("transport", [NAME, "pgqrs_celery.transport.Transport", "pgqrs", Transport])
@pytest.mark.parametrize("url", [None, "pgqrs://", "{dsn}", "pgqrs+{dsn}"])
def test_settings_of_the_app_reach_the_broker_and_the_ledger_is_in_its_database(
    transport: Any, url: str | None, database_dsn: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("named", broker=url and url.format(dsn=database_dsn), set_as_current=False)
    app.conf.update(broker_transport=transport, pgqrs_schema=schema, pgqrs_lease=7.0)
    if url is None or "dsn" not in url:
        app.conf.pgqrs_dsn = database_dsn
    pgqrs = Pgqrs(app)
    broker = own_broker(app)
    assert broker is not None
    assert (broker.settings.schema, broker.settings.lease) == (schema, 7.0)
    assert broker.database is pgqrs.ledger.database
    pgqrs.install()
    app.send_task("t", (1,))
    with app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare("celery", passive=True).message_count == 1
    broker.database.close()
    app.close()
