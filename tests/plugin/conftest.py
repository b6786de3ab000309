"""Fixtures of the tests at the level of Celery."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pgqrs_celery import embedded
from tests.support.bench import Bench
from tests.support.schemas import Schemas
from tests.support.shop import Shop


@pytest.fixture
def make_shop(redis_url: str, database_dsn: str, installed_schema: str) -> Iterator[Callable[..., Shop]]:
    """Make apps on Redis that store their results there, with their ledger installed; settings as keyword arguments."""
    made: list[Shop] = []

    def make(**conf: Any) -> Shop:
        shop = Shop(redis_url, database_dsn, installed_schema, **{"backend": redis_url, **conf})
        made.append(shop)
        return shop

    yield make
    for shop in made:
        shop.close()


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    """An app with the default settings."""
    return make_shop()


#: Databases that no other test is given.
_numbers = itertools.count(3000)


@pytest.fixture(scope="module", params=["redis", "postgres"])
def module_bench(
    request: pytest.FixtureRequest, redis_server: embedded.RedisServer, schemas: Schemas
) -> Iterator[Bench]:
    """A worker on Redis; results in Redis or in the ledger's database."""
    dsn, schema = schemas.dsn, schemas.take()
    redis = redis_server.database_url(next(_numbers))
    backend = redis if request.param == "redis" else f"pgqrs+{dsn}&pgqrs_schema={schema}"
    shop = Shop(
        redis, dsn, schema, backend=backend, pgqrs_plain_links="allow", pgqrs_max_result_bytes=10_000,
        accept_content=["json", "pickle"], result_accept_content=["json", "pickle"],
    )  # fmt: skip
    bench = Bench(shop)
    with shop.worker() as bench.worker:
        yield bench
    shop.close()
    schemas.give_back(schema)


@pytest.fixture
def bench(module_bench: Bench) -> Bench:
    """The worker of this module, with an empty journal."""
    module_bench.journal.clear()
    module_bench.broken.clear()
    return module_bench
