"""Waits of workflow functions: sleeping, events, children. None of them holds a worker slot."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgqrs_celery import EventTimeout, Pgqrs, RunCancelled, Status, StepMisused, WorkflowRun
from pgqrs_celery.exceptions import RunNotFound
from tests.functions.conftest import Working, ended
from tests.support.waiting import wait_for

Inner = Callable[[WorkflowRun], dict[str, str]]


class Boom(Exception):
    """What these tests fail with."""


def parked(run: WorkflowRun) -> bool:
    """Whether a run's function is asleep in the ledger."""
    return any(step.kind == "function" and step.status == "PAUSED" for step in run.steps())


def function_of(run: WorkflowRun) -> Any:
    """The row of a run's function."""
    return next(step for step in run.steps() if step.kind == "function")


def rouse(pgqrs: Pgqrs, run: WorkflowRun, *, early: bool) -> None:
    """Let a function that sleeps be executed now: ``early``, or with the deadline of what it waits for in the past."""
    table = f'"{pgqrs.ledger.database.schema}".pgqrs_workflow_steps'
    with pgqrs.ledger.database.transaction() as session:
        if not early:
            session.connection.execute(
                f"UPDATE {table} SET wake_at = now() WHERE workflow_id = %s AND status = 'PAUSED' AND kind = 'inner'",
                [run.id],
            )
        session.connection.execute(
            f"UPDATE {table} SET due_at = now() WHERE workflow_id = %s AND status = 'PAUSED' AND kind = 'function'",
            [run.id],
        )


# Sleeping


def test_a_sleep_frees_the_slot_is_no_attempt_and_keeps_its_deadline(pgqrs: Pgqrs, working: Working) -> None:
    calls: list[str] = []
    began: list[datetime] = []

    @pgqrs.workflow
    def nap(ctx: Any) -> str:
        ctx.step("before", lambda: calls.append("before"))
        began.append(datetime.now(UTC))
        ctx.sleep("nap", seconds=3600)
        calls.append("after")
        return "rested"

    with working():
        run = nap.delay()
        wait_for(lambda: parked(run), 30, "the function to sleep")
        asleep = function_of(run)
        assert (asleep.attempt, asleep.worker_id) == (0, None)
        hour = timedelta(hours=1)
        assert began[0] + hour <= asleep.due_at <= datetime.now(UTC) + hour
        rouse(pgqrs, run, early=True)
        wait_for(lambda: len(began) == 2 and parked(run), 30, "the function to sleep again")
        assert function_of(run).due_at == asleep.due_at
        rouse(pgqrs, run, early=False)
        assert run.get(timeout=60) == "rested"
    assert calls == ["before", "after"]
    assert function_of(run).attempt == 1
    assert len(began) == 3


def test_more_functions_sleep_than_a_worker_has_slots(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    def nap(ctx: Any, n: int) -> int:
        ctx.sleep(1)
        return n

    with working():
        runs = [nap.delay(n) for n in range(20)]
        assert [run.get(timeout=60) for run in runs] == list(range(20))


def test_sleeps_in_a_loop_and_until_a_moment(pgqrs: Pgqrs, working: Working, inner: Inner) -> None:
    @pgqrs.workflow
    def naps(ctx: Any) -> int:
        for _ in range(2):
            ctx.sleep(timedelta(seconds=0.05))
        ctx.sleep_until(datetime(2020, 1, 1, tzinfo=UTC), "past")
        with pytest.raises(StepMisused, match="time zone"):
            ctx.sleep_until(datetime(2020, 1, 1))
        return 2

    with working():
        run = naps.delay()
        assert run.get(timeout=60) == 2
    assert inner(run) == {"sleep": "SUCCESS", "sleep#2": "SUCCESS", "past": "SUCCESS"}


def test_user_code_cannot_swallow_a_suspension(pgqrs: Pgqrs, working: Working) -> None:
    reached: list[str] = []

    @pgqrs.workflow
    def stubborn(ctx: Any) -> str:
        try:
            ctx.sleep("nap", seconds=0.3)
        except BaseException:  # noqa: BLE001 - that is the point
            reached.append("swallowed")
            try:
                ctx.step("forbidden", lambda: reached.append("executed"))
            except BaseException:  # noqa: BLE001
                reached.append("again")
            return "wrong"
        return "right"

    with working():
        assert stubborn.delay().get(timeout=60) == "right"
    assert reached == ["swallowed", "again"]


def test_an_async_function_sleeps_and_waits_as_a_plain_one_does(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    async def nap(ctx: Any) -> Any:
        await ctx.sleep("nap", seconds=0.2)
        return [await ctx.wait_for_event("go"), await ctx.step("after", lambda: 2)]

    with working():
        run = nap.delay()
        wait_for(lambda: "go" in {s.step_id for s in run.steps()}, 30)
        pgqrs.emit(run, "go", 1)
        assert run.get(timeout=60) == [1, 2]


def test_a_step_that_failed_and_was_caught_is_not_executed_again_after_a_wait(pgqrs: Pgqrs, working: Working) -> None:
    calls: list[str] = []

    def charge() -> None:
        calls.append("charge")
        raise Boom("declined")

    @pgqrs.workflow
    def order(ctx: Any) -> str:
        try:
            ctx.step("charge", charge)
        except Boom as error:
            seen = str(error)
        ctx.sleep(0.1)
        return seen

    with working():
        assert order.delay().get(timeout=60) == "declined"
    assert calls == ["charge"]


# Events


def test_an_event_wakes_the_function_that_waits_for_it(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    def approval(ctx: Any) -> Any:
        return ctx.wait_for_event("approved")

    with working():
        run = approval.delay()
        wait_for(lambda: parked(run), 30)
        assert function_of(run).due_at is None
        assert pgqrs.emit(run, "approved", {"by": "me"}) is True
        assert pgqrs.emit(run, "approved", {"by": "somebody else"}) is False
        assert run.get(timeout=60) == {"by": "me"}


def test_an_event_emitted_before_the_wait_is_not_lost(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    def approval(ctx: Any) -> Any:
        return [ctx.wait_for_event("approved"), ctx.wait_for_event("approved")]

    run = approval.delay()
    pgqrs.emit(run.id, "approved")
    with working():
        assert run.get(timeout=60) == [None, None]


def test_an_event_for_a_run_that_does_not_exist_is_an_error(pgqrs: Pgqrs) -> None:
    with pytest.raises(RunNotFound, match="run 4711 does not exist"):
        pgqrs.emit(4711, "approved")


def test_a_time_out_is_raised_and_stays_even_if_the_event_comes_later(pgqrs: Pgqrs, working: Working) -> None:
    branches: list[str] = []

    @pgqrs.workflow
    def approval(ctx: Any) -> str:
        try:
            branches.append(ctx.wait_for_event("approved", timeout=0.3))
        except TimeoutError as error:
            branches.append(type(error).__name__)
        ctx.sleep("later", seconds=0.1)
        return ctx.wait_for_event("go on")

    with working():
        run = approval.delay()
        wait_for(lambda: any(s.step_id == "go on" for s in run.steps()), 30)
        pgqrs.emit(run, "approved", "late")
        pgqrs.emit(run, "go on", "done")
        assert run.get(timeout=60) == "done"
    assert set(branches) == {"EventTimeout"}


def test_an_event_wakes_nobody_who_has_stopped_waiting(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    def approval(ctx: Any) -> str:
        try:
            ctx.wait_for_event("approved", timeout=0.1)
        except EventTimeout:
            ctx.sleep("long", seconds=3600)
        return "rested"

    with working():
        run = approval.delay()
        wait_for(lambda: any(s.step_id == "long" for s in run.steps()) and parked(run), 30)
        deadline = function_of(run).due_at
        pgqrs.emit(run, "approved", "late")
        assert (function_of(run).status, function_of(run).due_at) == ("PAUSED", deadline)
        rouse(pgqrs, run, early=False)
        assert run.get(timeout=60) == "rested"


def test_a_cancelled_run_does_not_wake(pgqrs: Pgqrs, working: Working) -> None:
    woken: list[int] = []

    @pgqrs.workflow
    def approval(ctx: Any) -> None:
        ctx.wait_for_event("approved")
        woken.append(1)

    with working():
        run = approval.delay()
        wait_for(lambda: parked(run), 30)
        run.cancel()
        pgqrs.emit(run, "approved")
        with pytest.raises(RunCancelled):
            run.get(timeout=60)
        wait_for(lambda: not function_of(run).open, 30)
    assert woken == []
    assert {s.status for s in run.steps()} == {"CANCELLED"}


# Waits as links of a chain


def test_waits_are_links_of_a_chain(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.task(shared=False)
    def note(value: Any, label: str) -> Any:
        return [value, label]

    canvas = (
        note.s(1, "a") | pgqrs.sleep.s(seconds=0.2) | note.s("b") | pgqrs.wait_for_event.si("approved") | note.s("c")
    )
    with working():
        run = pgqrs.workflow("links", canvas).delay()
        wait_for(lambda: any(s.step_id == "wait_for_event" and s.status == "PAUSED" for s in run.steps()), 30)
        pgqrs.emit(run, "approved", "yes")
        assert run.get(timeout=60) == ["yes", "c"]
        assert next(s.output for s in run.steps() if s.step_id == "note#2") == '[[1, "a"], "b"]'


def test_waits_are_links_of_an_unnamed_chain_too(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.task(shared=False)
    def note(value: Any) -> Any:
        return value

    with working():
        result = (note.s(5) | pgqrs.sleep.s(seconds=0.1) | note.s()).delay()
        assert result.get(timeout=60) == 5


# In the calling process


def test_inline_a_sleep_takes_its_time_once(pgqrs: Pgqrs) -> None:
    attempts: list[float] = []

    @pgqrs.workflow
    def nap(ctx: Any) -> str:
        ctx.sleep("nap", seconds=0.3)
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            raise Boom
        return "rested"

    ctx = pgqrs.context(nap)
    began = time.monotonic()
    with pytest.raises(Boom):
        nap(ctx)
    assert nap(ctx) == "rested"
    assert attempts[0] - began >= 0.3


def test_inline_an_event_is_waited_for(pgqrs: Pgqrs) -> None:
    @pgqrs.workflow
    async def approval(ctx: Any) -> Any:
        first = await ctx.wait_for_event("approved", timeout=60)
        try:
            await ctx.wait_for_event("never", timeout=0.05)
        except EventTimeout:
            return first
        raise AssertionError

    ctx = pgqrs.context(approval)

    async def both() -> Any:
        waiting = asyncio.create_task(approval(ctx))
        await asyncio.to_thread(wait_for, lambda: pgqrs.run(ctx.id).steps()[-1].status == "PAUSED")
        await asyncio.to_thread(pgqrs.emit, ctx.id, "approved", "yes")
        return await waiting

    assert asyncio.run(both()) == "yes"


# Children


def test_gather_makes_calls_in_parallel_and_returns_results_in_order(
    pgqrs: Pgqrs, working: Working, inner: Inner
) -> None:
    barrier = threading.Barrier(3, timeout=30)

    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        barrier.wait()
        return ctx.step("inside", lambda: n * 10)

    @pgqrs.task(shared=False)
    def plain(n: int) -> int:
        barrier.wait()
        return n

    @pgqrs.workflow
    def fan_out(ctx: Any) -> Any:
        return ctx.gather(fetch.s(1), plain.s(5), fetch.s(2))

    with working():
        run = fan_out.delay()
        assert run.get(timeout=60) == [10, 5, 20]
    assert inner(run) == {
        "fetch": "SUCCESS",
        "fetch#2": "SUCCESS",
        "plain": "SUCCESS",
        "fetch/inside": "SUCCESS",
        "fetch#2/inside": "SUCCESS",
    }
    assert function_of(run).attempt == 1


def test_a_parallel_call_that_fails_is_raised_after_all_have_ended_and_made_again_on_resume(
    pgqrs: Pgqrs, working: Working
) -> None:
    calls: list[int] = []

    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        calls.append(n)
        if n == 2 and calls.count(2) == 1:
            raise Boom("two")
        return n

    @pgqrs.workflow
    def fan_out(ctx: Any) -> Any:
        return ctx.gather(*(fetch.s(n) for n in (1, 2, 3)))

    with working():
        run = ended(fan_out.delay())
        assert run.status is Status.FAILED
        with pytest.raises(Boom, match="two"):
            run.get(timeout=1)
        assert sorted(calls) == [1, 2, 3]
        assert run.resume().get(timeout=60) == [1, 2, 3]
    assert sorted(calls) == [1, 2, 2, 3]


def test_a_caught_failure_of_a_parallel_call_does_not_fail_the_run(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        if n:
            raise Boom(str(n))
        return n

    @pgqrs.workflow
    def fan_out(ctx: Any) -> Any:
        try:
            ctx.gather(fetch.s(0), fetch.s(1))
        except Boom as error:
            first = str(error)
        both = ctx.gather(fetch.s(0), fetch.s(2), return_exceptions=True)
        ctx.sleep(0.1)
        return [first, both[0], str(both[1])]

    with working():
        run = ended(fan_out.delay())
        assert run.get(timeout=1) == ["1", 0, "2"]
    assert run.status is Status.SUCCESS


def test_a_retried_function_makes_its_failed_parallel_calls_again(pgqrs: Pgqrs, working: Working) -> None:
    calls: list[int] = []

    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        calls.append(n)
        if n == 2 and calls.count(2) < 3:
            raise Boom
        return n

    @pgqrs.workflow(autoretry_for=(Boom,), retry_kwargs={"max_retries": 3, "countdown": 0.1})
    def fan_out(ctx: Any) -> Any:
        return ctx.gather(fetch.s(1), fetch.s(2))

    with working():
        assert fan_out.delay().get(timeout=60) == [1, 2]
    assert sorted(calls) == [1, 2, 2, 2]


def test_a_task_is_started_once_and_waited_for_later(pgqrs: Pgqrs, working: Working) -> None:
    calls: list[str] = []

    @pgqrs.task(shared=False)
    def mail(to: str) -> str:
        calls.append(to)
        return f"sent to {to}"

    @pgqrs.workflow
    def signup(ctx: Any) -> Any:
        pending = ctx.start(mail.s("a"), step_id="welcome")
        ctx.start(mail.s("b"))
        ctx.sleep(0.2)
        return ctx.wait(pending)

    with working():
        run = signup.delay()
        assert run.get(timeout=60) == "sent to a"
        ended(run)
    assert sorted(calls) == ["a", "b"]


async def _async_children(ctx: Any, fetch: Any) -> Any:
    pending = await ctx.start(fetch.s(7))
    return [await ctx.gather(fetch.s(1), fetch.s(2)), await ctx.wait(pending)]


def test_an_async_function_sends_from_its_threads_what_belongs_to_its_run(
    pgqrs: Pgqrs, working: Working, inner: Inner
) -> None:
    @pgqrs.task(shared=False)
    def child(n: int) -> int:
        return n

    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        child.delay(n)
        return n

    @pgqrs.workflow
    async def fan_out(ctx: Any) -> Any:
        await fetch(ctx, 0)
        return await _async_children(ctx, fetch)

    with working():
        run = ended(fan_out.delay())
        assert run.get(timeout=60) == [[1, 2], 7]
    names = sorted(s.task_name.rpartition(".")[2] for s in run.steps() if s.task_id)
    assert names == ["child"] * 4 + ["fan_out"] + ["fetch"] * 3


def test_inline_parallel_calls_are_made_in_this_process(pgqrs: Pgqrs) -> None:
    @pgqrs.step
    def fetch(ctx: Any, n: int) -> int:
        if n < 0:
            raise Boom
        return n

    @pgqrs.task(shared=False)
    def plain(n: int) -> int:
        return n

    @pgqrs.workflow
    def fan_out(ctx: Any) -> Any:
        return ctx.gather(fetch.s(1), plain.s(2), fetch.s(-1), return_exceptions=True)

    @pgqrs.workflow
    async def fan_out_async(ctx: Any) -> Any:
        with pytest.raises(Boom):
            await ctx.gather(fetch.s(-1))
        return await ctx.gather(fetch.s(1), plain.s(2))

    first, second, third = fan_out.function(pgqrs.context(fan_out))
    assert (first, second, type(third)) == (1, 2, Boom)
    assert asyncio.run(fan_out_async(pgqrs.context(fan_out_async))) == [1, 2]


def test_a_child_run_wakes_its_parent_and_is_started_once(pgqrs: Pgqrs, working: Working) -> None:
    starts: list[int] = []

    @pgqrs.task(shared=False)
    def plus(n: int, more: int) -> int:
        return n + more

    @pgqrs.workflow
    def ship(ctx: Any, n: int) -> int:
        ctx.step("count", lambda: starts.append(n))
        ctx.sleep(0.1)
        return n * 2

    canvas = pgqrs.workflow("canvas", plus.s(1) | plus.s(2))

    @pgqrs.workflow
    def order(ctx: Any) -> Any:
        child = ctx.start_child(ship, 21)
        other = ctx.start_child(canvas, 10)
        ctx.sleep("meanwhile", seconds=0.2)
        return [ctx.wait(child), ctx.wait(child, other), child.id]

    with working():
        run = ended(order.delay())
        first, both, child_id = run.get(timeout=1)
    assert (first, both) == (42, [42, 13])
    assert starts == [21]
    child = pgqrs.run(child_id)
    assert (child.status, child.record.name) == (Status.SUCCESS, "ship")
    assert child_id != run.id


def test_a_child_runs_failure_is_the_parents_to_handle(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.workflow
    def ship(ctx: Any) -> int:
        raise Boom("no stock")

    @pgqrs.workflow
    def slow(ctx: Any) -> None:
        ctx.wait_for_event("never")

    @pgqrs.workflow
    def order(ctx: Any) -> Any:
        cancelled = ctx.start_child(slow)
        try:
            ctx.wait(ctx.start_child(ship))
        except Boom as error:
            seen = str(error)
        try:
            ctx.wait(cancelled)
        except RunCancelled:
            return seen

    with working():
        run = order.delay()
        slow_runs = wait_for(
            lambda: [r for r in pgqrs.monitor.runs(name="slow") if parked(pgqrs.run(r.workflow_id))], 30
        )
        pgqrs.run(slow_runs[0].workflow_id).cancel()
        assert run.get(timeout=60) == "no stock"


def test_a_run_started_in_a_task_is_a_run_of_its_own(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.task(shared=False)
    def plus(n: int) -> int:
        return n + 1

    named = pgqrs.workflow("named", plus.s())

    @pgqrs.task(shared=False)
    def starter(n: int) -> int:
        return int(named.apply_async((n,), workflow_key=f"k{n}").id)

    with working():
        result = starter.delay(4)
        started = pgqrs.run(result.get(timeout=60))
        assert started.get(timeout=60) == 5
    outer = pgqrs.run_of(result)
    assert outer is not None
    assert outer.id != started.id
