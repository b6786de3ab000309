"""The workers the acceptance tests share, one fleet per broker and xdist worker."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgqrs_celery import embedded
from tests.support.fleet import Fleet
from tests.support.rabbitmq import Address
from tests.support.scenario import LOCAL, LONG_LEASE, QUEUED, Scenario

#: Everything on one Postgres is what tests use that do not care; others where the protocol is another there.
BROKERS = ["postgres", "redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]

#: The numbered databases of this session's Redis that its fleets use; tests get theirs from 0 upwards.
FLEET_DATABASE, BRIEF_DATABASE, LOCAL_DATABASE = 4095, 4092, 4089


@pytest.fixture(scope="session")
def fleet_scenario(
    postgres_server: embedded.PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Scenario]:
    """Make the scenario of a shared fleet: on one Postgres, or on another broker with its results in a Redis."""

    def make(broker: str | None = None, backend: str | None = None, **conf: Any) -> Scenario:
        scenario = Scenario.on_postgres(
            postgres_server.start().dsn(),
            schema=f"fleet_{uuid.uuid4().hex[:12]}",
            directory=str(tmp_path_factory.mktemp("fleet")),
        )
        return scenario.using(broker, backend).with_conf(**conf)

    return make


@pytest.fixture(scope="session")
def postgres_fleet(fleet_scenario: Callable[..., Scenario]) -> Iterator[Fleet]:
    """Two prefork workers of two processes each, with everything on one Postgres; every link goes through the queue."""
    with Fleet(fleet_scenario(**LONG_LEASE, **QUEUED)) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def redis_fleet(fleet_scenario: Callable[..., Scenario], redis_server: embedded.RedisServer) -> Iterator[Fleet]:
    """Two prefork workers of two processes each, on Redis; every link goes through the queue."""
    redis = redis_server.database_url(FLEET_DATABASE)
    with Fleet(fleet_scenario(redis, redis, **LONG_LEASE, **QUEUED)) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def local_redis_fleet(fleet_scenario: Callable[..., Scenario], redis_server: embedded.RedisServer) -> Iterator[Fleet]:
    """The like of `redis_fleet`, whose processes go on with the next link themselves."""
    redis = redis_server.database_url(LOCAL_DATABASE)
    with Fleet(fleet_scenario(redis, redis, **LONG_LEASE, **LOCAL)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def local_rabbitmq_fleet(fleet_scenario: Callable[..., Scenario], rabbitmq_server: Address) -> Iterator[Fleet]:
    """The like of `local_fleet` whose messages go through RabbitMQ; results are in Postgres."""
    with rabbitmq_server.vhost() as url, Fleet(fleet_scenario(url, **LONG_LEASE, **LOCAL)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def brief_postgres_fleet(fleet_scenario: Callable[..., Scenario]) -> Iterator[Fleet]:
    """The like of `postgres_fleet` for tests in which a lease has to end."""
    with Fleet(fleet_scenario(**QUEUED)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def brief_redis_fleet(fleet_scenario: Callable[..., Scenario], redis_server: embedded.RedisServer) -> Iterator[Fleet]:
    """The like of `redis_fleet` for tests in which a lease has to end."""
    redis = redis_server.database_url(BRIEF_DATABASE)
    with Fleet(fleet_scenario(redis, redis, **QUEUED)) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def local_fleet(fleet_scenario: Callable[..., Scenario]) -> Iterator[Fleet]:
    """The like of `postgres_fleet`, whose processes go on with the next link themselves."""
    with Fleet(fleet_scenario(**LONG_LEASE, **LOCAL)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def brief_local_fleet(fleet_scenario: Callable[..., Scenario]) -> Iterator[Fleet]:
    """The like of `local_fleet` for tests in which a lease has to end."""
    with Fleet(fleet_scenario(**LOCAL)) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def rabbitmq_fleet(
    fleet_scenario: Callable[..., Scenario], redis_server: embedded.RedisServer, rabbitmq_server: Address
) -> Iterator[Fleet]:
    """Two prefork workers of two processes each, on RabbitMQ; every link goes through the queue."""
    redis = redis_server.database_url(FLEET_DATABASE)
    with rabbitmq_server.vhost() as url, Fleet(fleet_scenario(url, redis, **LONG_LEASE, **QUEUED)) as fleet:
        yield fleet


@pytest.fixture(params=["postgres"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """A shared fleet, complete and ready; on one Postgres, unless the test says on which brokers."""
    shared: Fleet = request.getfixturevalue(f"{request.param}_fleet")
    shared.fill()
    return shared


@pytest.fixture
def scenario(database_dsn: str, installed_schema: str, tmp_path: Path) -> Scenario:
    """A scenario of the test's own on one Postgres, without workers."""
    return Scenario.on_postgres(database_dsn, schema=installed_schema, directory=str(tmp_path))


@pytest.fixture(params=BROKERS)
def each_scenario(request: pytest.FixtureRequest, scenario: Scenario) -> Scenario:
    """A scenario of the test's own on each broker."""
    if request.param == "postgres":
        return scenario
    if request.param == "local":
        return scenario.with_conf(**LOCAL)
    redis = request.getfixturevalue("redis_url")
    return scenario.using(redis if request.param == "redis" else request.getfixturevalue("rabbitmq_url"), redis)
