"""The same promises with every pool Celery has, and with processes that are replaced after a few tasks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from celery import chain, group

from pgqrs_celery import Status
from tests.support.fleet import Fleet
from tests.support.scenario import LONG_LEASE, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE

RECYCLED = {"pool": "prefork", "concurrency": 2, "arguments": ["--max-tasks-per-child=4"]}
GREEN = ("gevent", "eventlet")
POOLS = [
    pytest.param(RECYCLED, id="prefork-recycled"),
    pytest.param({"pool": "threads", "concurrency": 4}, id="threads"),
    pytest.param({"pool": "solo", "concurrency": 1}, id="solo"),
    *(
        pytest.param(
            {"pool": pool, "concurrency": 4},
            id=pool,
            marks=pytest.mark.skipif(importlib.util.find_spec(pool) is None, reason=f"{pool} is NOT INSTALLED"),
        )
        for pool in GREEN
    ),
]


ROWS = [
    *(pytest.param("postgres", *pool.values, id=str(pool.id), marks=pool.marks) for pool in POOLS),
    *(pytest.param("local", *pool.values, id=f"{pool.id}-local", marks=pool.marks) for pool in POOLS[1:3]),
    *(pytest.param("redis", *pool.values, id=f"{pool.id}-redis", marks=pool.marks) for pool in POOLS[1:4:2]),
]


@pytest.mark.parametrize(("each_scenario", "options"), ROWS, indirect=["each_scenario"])
def test_chains_and_groups_end_well_and_a_killed_worker_s_step_runs_again(
    each_scenario: Scenario, options: dict[str, Any]
) -> None:
    with Fleet(each_scenario.with_conf(**LONG_LEASE), options=options) as fleet:
        step = fleet.tasks.step
        chains = [[named(step.s([], f"{n}a")), named(step.s("b")), named(step.s("c"))] for n in range(8)]
        results = group(chain(*links) for links in chains).delay()
        assert results.get(timeout=PATIENCE) == [[f"{n}a", "b", "c"] for n in range(8)]
        assert fleet.ended(results.id).status is Status.SUCCESS
        fleet.expect({link.id: 1 for links in chains for link in links})

        links = [named(step.s([], "a")), named(step.s("b")), named(step.s("c"))]
        with each_scenario.points.arm("in_body", links[1].id) as trap:
            result = chain(*links).delay()
            fleet.kill("worker", trap.wait())
            assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        assert fleet.ended(links[0].id).status is Status.SUCCESS
        fleet.expect({links[0].id: 1, links[1].id: 2, links[2].id: 1})
