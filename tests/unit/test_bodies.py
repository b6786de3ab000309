"""When a function may be put to sleep: what is under way in it, and in its event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgqrs_celery.bodies import Bodies, first_task


async def nested(depth: int, work: Any) -> None:
    """Wait for something through so many gathers."""
    await (asyncio.gather(nested(depth - 1, work)) if depth else work)


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("passes", range(6))
def test_a_function_does_not_sleep_while_the_end_of_a_task_is_on_its_way_to_it(passes: int, depth: int) -> None:
    bodies, may = Bodies(), []

    async def wait() -> None:
        with bodies.waiting(None), bodies.in_loop():
            while not any(may):
                await bodies.look_around()
                with bodies.parking(True) as parking:
                    may.append(parking)

    async def fail() -> None:
        for _ in range(passes):
            await asyncio.sleep(0)
        raise ValueError("no")

    async def function() -> None:
        first_task.set(asyncio.current_task())
        await asyncio.gather(wait(), nested(depth, fail()))

    with pytest.raises(ValueError, match="no"):
        asyncio.run(function())
    assert True not in may


def test_a_function_sleeps_when_all_its_tasks_wait() -> None:
    bodies, may = Bodies(), []

    async def wait() -> None:
        with bodies.waiting(None), bodies.in_loop():
            await bodies.look_around()
            with bodies.parking(True) as parking:
                may.append(parking)

    async def function() -> None:
        first_task.set(asyncio.current_task())
        await asyncio.gather(wait(), wait())

    asyncio.run(function())
    assert True in may
