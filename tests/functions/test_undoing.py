"""Runs that are cancelled undo what their functions have done."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pgqrs_celery import Pgqrs, RunCancelled, Status, WorkflowRun
from pgqrs_celery.store import runs
from tests.functions.conftest import Working
from tests.functions.test_sent_steps import Bookings
from tests.support.waiting import wait_for


def function_of(run: WorkflowRun) -> Any:
    """The row of a run's function."""
    return next(step for step in run.steps() if step.kind == "function")


def asleep(run: WorkflowRun) -> bool:
    """Whether a run's function is parked."""
    return function_of(run).status == "PAUSED"


def cancelled(run: WorkflowRun) -> None:
    """Cancel a run and wait until its function has undone everything."""
    run.cancel()
    with pytest.raises(RunCancelled):
        run.get(timeout=1)
    wait_for(lambda: function_of(run).status == "CANCELLED", 60, "the function to have ended")
    assert run.status is Status.CANCELLED


def test_a_cancelled_function_executes_nothing_but_its_compensations(pgqrs: Pgqrs, working: Working) -> None:
    bookings, after = Bookings(pgqrs), []

    @pgqrs.workflow
    def trip(ctx: Any) -> None:
        bookings.book(ctx, "flight")
        ctx.gather(bookings.book.s("hotel"))
        if not ctx.patched("with an event"):
            after.append("patched")
        ctx.sleep("long", hours=1)
        after.append("slept")
        bookings.book(ctx, "boat")

    with working():
        run = trip.delay()
        wait_for(lambda: asleep(run) and "long" in {s.step_id for s in run.steps()}, 60, "the function to sleep")
        cancelled(run)
    assert bookings.log == ["book flight", "book hotel", "undo hotel", "undo flight"]
    assert after == []


def test_a_cancelled_function_without_compensations_is_cancelled_at_once(pgqrs: Pgqrs, working: Working) -> None:
    entered: list[int] = []

    @pgqrs.workflow
    def nap(ctx: Any) -> None:
        entered.append(1)
        ctx.step("plain", int)
        ctx.sleep("long", hours=1)

    with working():
        run = nap.delay()
        wait_for(lambda: asleep(run), 60, "the function to sleep")
        run.cancel()
        assert function_of(run).status == "CANCELLED"
    assert entered == [1]


def test_an_async_function_that_is_cancelled_undoes_what_ran_side_by_side(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []

    async def undo(ctx: Any, booked: str) -> None:
        await ctx.step("refund", log.append, f"undo {booked}")

    @pgqrs.step(compensate=undo)
    async def book(ctx: Any, what: str) -> str:
        return what

    @pgqrs.workflow
    async def trip(ctx: Any) -> None:
        async def nap() -> None:
            await ctx.sleep("long", hours=1)

        async def outward() -> None:
            await ctx.step("think", int)
            await asyncio.to_thread(int)
            await book(ctx, "hotel")

        await ctx.gather(book.s("flight"))
        await asyncio.gather(nap(), outward())

    with working():
        run = trip.delay()
        wait_for(lambda: asleep(run) and "book#2" in {s.step_id for s in run.steps()}, 60, "the function to sleep")
        cancelled(run)
    assert log == ["undo hotel", "undo flight"]


def test_a_cancelled_function_that_is_under_way_undoes_what_is_recorded(pgqrs: Pgqrs, working: Working) -> None:
    bookings, reached, go = Bookings(pgqrs), threading.Event(), threading.Event()

    @pgqrs.workflow
    def trip(ctx: Any) -> None:
        bookings.book(ctx, "flight")
        ctx.step("under way", lambda: (reached.set(), go.wait(60)))
        bookings.book(ctx, "hotel")

    with working():
        run = trip.delay()
        assert reached.wait(60)
        cancelled(run)
        go.set()
    assert bookings.log == ["book flight", "undo flight"]


def test_a_compensation_that_fails_does_not_keep_a_cancelled_function_from_ending(
    pgqrs: Pgqrs, working: Working
) -> None:
    log: list[str] = []

    def undo(ctx: Any, booked: str) -> None:
        log.append(booked)
        raise ValueError(booked)

    @pgqrs.step(compensate=undo)
    def book(ctx: Any, what: str) -> str:
        return what

    @pgqrs.workflow(autoretry_for=(Exception,), retry_kwargs={"countdown": 0})
    def trip(ctx: Any) -> None:
        book(ctx, "flight")
        book(ctx, "hotel")
        ctx.sleep("long", hours=1)

    with working():
        run = trip.delay()
        wait_for(lambda: asleep(run), 60, "the function to sleep")
        cancelled(run)
    assert log == ["hotel", "flight"]


def test_a_function_that_finds_its_run_cancelled_before_anybody_has_told_it_undoes_what_it_has_done(
    pgqrs: Pgqrs, working: Working
) -> None:
    bookings = Bookings(pgqrs)

    @pgqrs.workflow
    def trip(ctx: Any) -> None:
        bookings.book(ctx, "flight")
        ctx.wait_for_event("go")

    with working():
        run = trip.delay()
        wait_for(lambda: asleep(run), 60, "the function to sleep")
        # As if the process that cancels it had died between its two steps.
        assert pgqrs.ledger.call(lambda session: runs.cancel(session, run.id))
        pgqrs.emit(run, "go")
        wait_for(lambda: function_of(run).status == "CANCELLED", 60, "the function to have ended")
    assert bookings.log == ["book flight", "undo flight"]
