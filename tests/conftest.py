"""The servers the tests run on: one Postgres and one RabbitMQ per session, one Redis per xdist worker.

The process that runs the session makes a directory for them, which the xdist workers find through the environment
(``PGQRS_CELERY_HOME``), as does every process a test starts: what asks for "the embedded Postgres" gets the
session's, never the developer's own.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgqrs_celery import embedded
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.embedded.account import make_directory
from pgqrs_celery.embedded.locks import FileLock
from tests.support.pgbouncer import find_pgbouncer, pgbouncer_for
from tests.support.proxy import Proxy
from tests.support.rabbitmq import Address, find_rabbitmq, shared_rabbitmq, wait_until_gone
from tests.support.schemas import Schemas, drop_schema, new_name
from tests.support.waiting import PATIENCE, wait_for

#: Set in CI: a broker that is missing fails the tests that need it.
REQUIRE_BROKERS = "PGQRS_REQUIRE_BROKERS"

# Commits still reach the operating system, so nothing is lost when a test kills the server. A fleet of two workers has
# two dozen connections, and every xdist worker has several fleets. A schema per test is many new tables, which are made
# sooner where their creation need not be replicated.
POSTGRES_SETTINGS = {
    "max_connections": "800",
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}

#: Bytes; the servers of a whole session take about half of it.
MEMORY_NEEDED = 4 << 30

_DATABASES = 4096
_PREFIX = f"pgqrs-tests-{os.getuid()}-"
_session_lock = pytest.StashKey[FileLock]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # an xdist worker
        return
    home = embedded.new_directory(_PREFIX, parent=_memory())
    lock = FileLock.try_exclusive(home / "session.lock")
    assert lock is not None
    config.stash[_session_lock] = lock
    _remove_abandoned(home.parent)
    os.environ[embedded.HOME_VARIABLE] = str(home)
    os.environ.pop(DSN_VARIABLE, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what imports and collection have made out of later garbage collections: each would take 200 ms."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    lock = config.stash.get(_session_lock, None)
    if lock is not None:
        _remove(lock.path.parent)
        lock.close()


def _memory() -> Path | None:
    """Return a file system in memory for what the servers write, if there is one: a schema is a hundred files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free >= MEMORY_NEEDED else None


def _remove_abandoned(parent: Path) -> None:
    """Remove what sessions left that were killed: those whose lock is free."""
    for lock_path in parent.glob(f"{_PREFIX}*/session.lock"):
        lock = FileLock.try_exclusive(lock_path)
        if lock is not None:
            _remove(lock_path.parent)
            lock.close()


def _remove(home: Path) -> None:
    for lock_path in home.glob("*/supervisor.lock"):
        embedded.PostgresServer(lock_path.parent).stop()
    wait_until_gone(home / "rabbitmq")
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[embedded.PostgresServer]:
    """The session's Postgres. A test that kills or restarts it needs one of its own: `own_postgres`."""
    with embedded.postgres(settings=POSTGRES_SETTINGS) as server:
        yield server


@pytest.fixture
def database_dsn(postgres_server: embedded.PostgresServer) -> str:
    """The DSN of the database all tests share; keep to a schema of your own."""
    return postgres_server.start().dsn()


@pytest.fixture
def proxy(postgres_server: embedded.PostgresServer) -> Iterator[Proxy]:
    """A proxy in front of the session's Postgres."""
    directory = embedded.new_directory("pgqrs-proxy-")
    proxy = Proxy(directory, postgres_server.socket_directory / ".s.PGSQL.5432")
    yield proxy
    proxy.close()


@pytest.fixture
def own_database_dsn(postgres_server: embedded.PostgresServer) -> Iterator[str]:
    """The DSN of a new, empty database, for tests that use the default schema (some 100 ms)."""
    name = f"d_{uuid.uuid4().hex[:16]}"
    admin = postgres_server.start().dsn()
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield postgres_server.dsn(name)
    with psycopg.connect(postgres_server.start().dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def schema(postgres_server: embedded.PostgresServer) -> Iterator[str]:
    """The name of a schema of the test's own, not created yet; dropped afterwards with all it holds."""
    name = new_name()
    yield name
    drop_schema(postgres_server.start().dsn(), name)


@pytest.fixture(scope="session")
def schemas(postgres_server: embedded.PostgresServer) -> Schemas:
    """This worker's schemas that are used again."""
    return Schemas(postgres_server.start().dsn())


@pytest.fixture
def installed_schema(schemas: Schemas) -> Iterator[str]:
    """The name of a schema of the test's own with everything installed in it."""
    name = schemas.take()
    yield name
    schemas.give_back(name)


@pytest.fixture
def server_directory() -> Iterator[Path]:
    """A directory, not made yet, for a server of the test's own; stopped and removed afterwards."""
    path = embedded.default_directory() / f"own-{uuid.uuid4().hex[:12]}"
    yield path
    embedded.PostgresServer(path).stop()
    if path.is_dir():
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster() -> Path:
    """The data of a new server that has been stopped, made once per session: copying takes a fifth of `initdb`."""
    directory = embedded.default_directory() / "cluster"
    lock = wait_for(lambda: FileLock.try_exclusive(directory.with_suffix(".lock")), PATIENCE, "the cluster")
    if not (directory / "data").exists():
        with embedded.postgres(directory, settings=POSTGRES_SETTINGS) as server:
            server.stop()
    lock.close()
    return directory / "data"


@pytest.fixture
def own_data(cluster: Path, server_directory: Path) -> Path:
    """The directory of a server of the test's own, with its data."""
    make_directory(server_directory, passable=True)
    subprocess.run(["cp", "-a", str(cluster), str(server_directory / "data")], check=True)
    return server_directory


@pytest.fixture
def own_postgres(own_data: Path) -> embedded.PostgresServer:
    """A Postgres of the test's own, to be killed and restarted (some 300 ms)."""
    return embedded.postgres(own_data, settings=POSTGRES_SETTINGS)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[embedded.RedisServer]:
    """This worker's Redis. A test that kills it needs one of its own: `own_redis`."""
    with embedded.redis_server("--databases", str(_DATABASES)) as server:
        yield server


_numbers = itertools.count()


@pytest.fixture
def redis_url(redis_server: embedded.RedisServer) -> str:
    """The URL of an empty, numbered database of the test's own; queues and broadcasts do not cross over."""
    return redis_server.database_url(next(_numbers))


@pytest.fixture
def own_redis() -> Iterator[embedded.RedisServer]:
    """A Redis of the test's own, to be killed and restarted."""
    with embedded.redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[Address]:
    """The session's RabbitMQ, shared by all xdist workers."""
    if find_rabbitmq() is None:
        reason = "RabbitMQ is NOT INSTALLED (rabbitmq-server, erl): what this test checks stays unchecked"
        if os.environ.get(REQUIRE_BROKERS):
            pytest.fail(reason)
        pytest.skip(reason)
    with shared_rabbitmq(embedded.default_directory() / "rabbitmq") as address:
        yield address


@pytest.fixture
def pgbouncer(postgres_server: embedded.PostgresServer) -> Iterator[Callable[[str], str]]:
    """Start a pgbouncer in front of the session's Postgres, in a pool mode, and return its DSN."""
    if find_pgbouncer() is None:
        reason = "pgbouncer is NOT INSTALLED: what this test checks stays unchecked"
        if os.environ.get(REQUIRE_BROKERS):
            pytest.fail(reason)
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda mode: stack.enter_context(pgbouncer_for(postgres_server.start(), mode))


@pytest.fixture
def rabbitmq_url(rabbitmq_server: Address) -> Iterator[str]:
    """The URL of a virtual host of the test's own."""
    with rabbitmq_server.vhost() as url:
        yield url
