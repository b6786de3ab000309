"""kombu's own integration tests for a transport, from its source distribution, run against the Postgres broker."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote, urlparse

import kombu
import pytest

import pgqrs_celery
from pgqrs_celery.db import Database
from pgqrs_celery.embedded import PostgresServer
from tests.support.sdist import unpacked

NOBODY = "pgqrs+postgresql://127.0.0.1:1/nothing"

assert pgqrs_celery  # importing it registers the transport


def _common() -> ModuleType:
    path = unpacked("kombu") / "t" / "integration" / "common.py"
    spec = importlib.util.spec_from_file_location("kombu_integration_common", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


common: Any = _common()


@pytest.fixture
def invalid_connection() -> kombu.Connection:
    return kombu.Connection(NOBODY)


@pytest.fixture
def failover_connection(postgres_server: PostgresServer, database: Database) -> kombu.Connection:
    # kombu takes a URL to pieces when it fails over to it, and has no room for a query there.
    directory = quote(str(postgres_server.socket_directory), safe="")
    live = f"pgqrs+postgresql://postgres@{directory}/postgres"
    return kombu.Connection(f"{NOBODY};{live}", transport_options={"schema": database.schema})


class TestBasic(common.BasicFunctionality):
    pass


class TestExchangeTypes(common.BaseExchangeTypes):
    pass


class TestTimeToLive(common.BaseTimeToLive):
    pass


class TestPriority(common.BasePriority):
    PRIORITY_ORDER = "asc"  # as AMQP has it: higher first


class TestMessage(common.BaseMessage):
    pass


class TestEventLoop(common.BaseEventLoop):
    pass


class TestFailover(common.BaseFailover):
    def test_failover_switches_to_alternate_url(self, failover_connection: Any) -> None:
        # The original looks at ``port``; a URL that its transport reads itself stays in one piece until a failover.
        live = urlparse(failover_connection.alt[-1])
        assert urlparse(failover_connection.hostname).port == 1
        assert failover_connection.connect()
        assert failover_connection.connected
        assert failover_connection.hostname == unquote(live.hostname or "")
        assert failover_connection.transport_cls == live.scheme
        failover_connection.close()


def test_an_acknowledged_message_is_gone_after_the_connection_closes(
    database: Database, connection: kombu.Connection
) -> None:
    with connection.SimpleQueue("last") as queue:
        queue.put("x")
        queue.get(timeout=5).ack()
    connection.close()
    with database.session() as session:
        assert session.connection.execute(f'SELECT count(*) FROM "{database.schema}".pgqrs_messages').fetchone() == (0,)
