"""Eager mode, in which users' unit tests run: workflows are executed before their handle is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from pgqrs_celery import NotDurable, Pgqrs, RunNotFound, RunStateError, Status


class Boom(Exception):
    """What these tests fail with."""


@pytest.fixture
def eager(new_pgqrs: Callable[..., Pgqrs]) -> Pgqrs:
    """An app in eager mode, with a database."""
    return new_pgqrs(task_always_eager=True)


@pytest.fixture
def alone() -> Pgqrs:
    """An app in eager mode that can reach neither database nor broker."""
    app = Celery("alone", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.update(pgqrs_dsn="host=127.0.0.1 port=1 dbname=nowhere", task_always_eager=True)
    return Pgqrs(app)


def tasks(pgqrs: Pgqrs) -> tuple[Any, Any, Any]:
    """Durable tasks: one more, the sum, and one that fails."""

    @pgqrs.task(name="eager.more", shared=False)
    def more(n: int) -> int:
        return n + 1

    @pgqrs.task(name="eager.total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @pgqrs.task(name="eager.fail", shared=False)
    def fail(*_: Any) -> None:
        raise Boom("no")

    return more, total, fail


def test_a_named_canvas_is_executed_without_a_database_and_its_handle_has_the_result(alone: Pgqrs) -> None:
    more, total, _ = tasks(alone)
    run = alone.workflow("steps", chain(more.s(), more.s())).delay(1)
    assert (run.get(timeout=1), run.status, run.steps()) == (3, Status.SUCCESS, [])
    assert alone.workflow("side by side", group(more.s(1), more.s(2))).delay().get() == [2, 3]
    assert alone.workflow("sum", chord([more.s(1), more.s(2)], total.s())).apply_async(workflow_key="k").get() == 5


def test_a_named_canvas_that_fails_says_so_in_its_handle_or_at_once(alone: Pgqrs) -> None:
    _, _, fail = tasks(alone)
    run = alone.workflow("bad", fail.s()).delay()
    assert (run.status, run.get(propagate=False)) == (Status.FAILED, None)
    with pytest.raises(Boom):
        run.get()
    alone.app.conf.task_eager_propagates = True
    with pytest.raises(Boom):
        alone.workflow("bad", fail.s()).delay()


def test_what_needs_a_record_of_an_eager_canvas_names_the_setting(alone: Pgqrs) -> None:
    more, _, _ = tasks(alone)
    run = alone.workflow("one", more.s()).delay(1)
    with pytest.raises(RunNotFound, match=r"'one'.*task_always_eager.*start_worker"):
        _ = run.record
    for refused in (run.resume, run.cancel, run.pause, run.unpause):
        with pytest.raises(RunStateError, match=r"'one'.*task_always_eager"):
            refused()


def test_a_function_is_a_recorded_run_whose_handle_answers_everything(eager: Pgqrs) -> None:
    calls: list[int] = []

    @eager.step
    def more(ctx: Any, n: int) -> int:
        calls.append(n)
        return n + 1

    @eager.workflow
    def inner(ctx: Any, n: int) -> int:
        return more(ctx, n)

    @eager.workflow
    def flow(ctx: Any, n: int) -> Any:
        return [more(ctx, n), ctx.gather(more.s(n), more.s(n)), ctx.wait(ctx.start_child(inner, n))]

    run = flow.apply_async((1,), workflow_key="key")
    assert run.get(timeout=1) == [2, [2, 2], 2]
    assert (run.status, run.record.name) == (Status.SUCCESS, "flow")
    assert [step.step_id for step in run.steps()][:2] == ["flow()", "more"]
    assert flow.apply_async((1,), workflow_key="key") == run
    assert calls == [1] * 4


def test_a_function_that_fails_can_be_called_again_and_resume_says_how(eager: Pgqrs) -> None:
    calls: list[str] = []

    @eager.workflow
    def flow(ctx: Any) -> str:
        ctx.step("first", calls.append, "first")
        if len(calls) == 1:
            calls.append("failed")
            raise Boom("no")
        return "done"

    run = flow.apply_async(workflow_key="key")
    assert run.status is Status.FAILED
    with pytest.raises(Boom):
        run.get(timeout=1)
    how = rf"call the function again.*pgqrs\.context\(run={run.id}\).*workflow_key='key'"
    with pytest.raises(RunStateError, match=how):
        run.resume()
    assert flow(eager.context(run=run.id)) == "done"
    assert run.get(timeout=1) == "done"
    assert calls == ["first", "failed"]


def test_a_function_that_is_retried_stays_one_run(eager: Pgqrs) -> None:
    calls: list[str] = []

    @eager.workflow(autoretry_for=(Boom,), retry_kwargs={"countdown": 0, "max_retries": 2})
    def flow(ctx: Any) -> str:
        ctx.step("first", calls.append, "first")
        calls.append("body")
        if calls.count("body") < 3:
            raise Boom
        return "done"

    assert flow.delay().get(timeout=1) == "done"
    assert calls == ["first", "body", "body", "body"]
    assert len(eager.monitor.runs()) == 1


def test_a_function_in_an_eager_canvas_is_not_mistaken_for_the_whole(eager: Pgqrs) -> None:
    more, _, _ = tasks(eager)

    @eager.workflow
    def double(ctx: Any, n: int) -> int:
        return ctx.step("double", lambda: 2 * n)

    assert eager.workflow("mixed", chain(more.s(), double.s(), more.s())).delay(1).get() == 5


def test_an_eager_canvas_cannot_be_waited_for_as_a_child(eager: Pgqrs) -> None:
    more, _, _ = tasks(eager)
    child = eager.workflow("child", more.s())

    @eager.workflow
    def parent(ctx: Any) -> None:
        ctx.start_child(child, 1)

    with pytest.raises(NotDurable, match="task_always_eager"):
        parent.delay().get(timeout=1)
