"""Waits beside steps in one asynchronous function: what is under way is finished before the function sleeps."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pgqrs_celery import Pgqrs, WorkflowRun
from tests.functions.conftest import Working
from tests.support.waiting import wait_for

Inner = Callable[[WorkflowRun], dict[str, str]]


def asleep(run: WorkflowRun) -> bool:
    """Whether a run's function is parked."""
    return any(step.kind == "function" and step.status == "PAUSED" for step in run.steps())


@pytest.mark.parametrize("kind", ["sleep", "event", "gather"])
def test_a_step_beside_a_wait_is_executed_once_and_recorded_before_the_function_sleeps(
    pgqrs: Pgqrs, working: Working, inner: Inner, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    log: list[str] = []
    go, child = threading.Event(), threading.Event()

    @pgqrs.step
    def slow(ctx: Any) -> str:
        log.append("slow")
        assert go.wait(60)
        return "slow"

    @pgqrs.step
    def sent(ctx: Any) -> str:
        assert child.wait(60)
        return "sent"

    @pgqrs.workflow
    async def both(ctx: Any) -> Any:
        async def wait() -> Any:
            if kind == "sleep":
                return await ctx.sleep("nap", seconds=1)
            return await (ctx.wait_for_event("news") if kind == "event" else ctx.gather(sent.s()))

        async def work() -> list[Any]:
            return [await slow(ctx), await ctx.step("after", log.append, "after")]

        return await asyncio.gather(wait(), work())

    with working(), caplog.at_level(logging.INFO):
        run = both.delay()
        wait_for(lambda: log == ["slow"], 60, "the step to begin")
        if kind != "sleep":  # while the step is under way, the function looks again and again, and stays awake
            assert not asleep(run)
        go.set()
        if kind != "sleep":
            wait_for(lambda: asleep(run), 60, "the function to sleep")
            assert inner(run)["slow"] == "SUCCESS"
        pgqrs.emit(run, "news", "good")
        child.set()
        value, done = run.get(timeout=60)
    assert value == {"sleep": None, "event": "good", "gather": ["sent"]}[kind]
    assert done == ["slow", None]
    assert log.count("slow") == 1
    assert "another process" not in caplog.text


def test_steps_that_wait_do_not_keep_each_other_awake(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.step
    async def ask(ctx: Any, what: str) -> Any:
        return await ctx.wait_for_event(what)

    @pgqrs.workflow
    async def both(ctx: Any) -> Any:
        return await asyncio.gather(ask(ctx, "a"), ask(ctx, "b"), ctx.wait_for_event("c"))

    with working():
        run = both.delay()
        for name in ("c", "a", "b"):
            wait_for(lambda: asleep(run), 60, "the function to sleep")
            pgqrs.emit(run, name, name.upper())
        assert run.get(timeout=60) == ["A", "B", "C"]


def test_a_step_that_fails_beside_a_wait_fails_the_function_once(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []

    @pgqrs.step
    async def fail(ctx: Any) -> None:
        log.append("fail")
        await asyncio.sleep(0.2)
        raise ValueError("no")

    @pgqrs.workflow
    async def both(ctx: Any) -> Any:
        return await asyncio.gather(ctx.wait_for_event("never"), fail(ctx))

    with working(), pytest.raises(ValueError, match="no"):
        both.delay().get(timeout=60)
    assert log == ["fail"]
