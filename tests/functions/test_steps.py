"""Steps of workflow functions: recorded once, skipped on replay, executed again after a failure."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import gc
import math
import tracemalloc
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from pgqrs_celery import Pgqrs, Status, WorkflowRun, inline
from pgqrs_celery.exceptions import (
    InputChanged,
    LeaseLost,
    ResultNotSerializable,
    RunStateError,
    StepFailed,
    StepMisused,
    WorkflowKeyConflict,
)
from tests.functions.conftest import Working, ended

Inner = Callable[[WorkflowRun], dict[str, str]]


class Boom(Exception):
    """What steps of these tests fail with."""


def of_one_step(pgqrs: Pgqrs, name: str, function: Callable[[], Any]) -> Any:
    """A workflow that calls one step and returns its result."""

    def body(ctx: Any) -> Any:
        return ctx.step(name, function)

    return pgqrs.workflow(body)


def test_a_finished_step_is_skipped_and_a_failed_one_executed_again(pgqrs: Pgqrs, inner: Inner) -> None:
    calls: list[str] = []

    @pgqrs.step
    def one(ctx: Any, data: str) -> str:
        calls.append("one")
        return f"processed_{data}"

    @pgqrs.step
    def two(ctx: Any, data: str) -> str:
        calls.append("two")
        if calls.count("two") == 1:
            raise Boom("simulated crash")
        return f"step2_{data}"

    @pgqrs.workflow
    def demo(ctx: Any, data: str) -> str:
        return two(ctx, one(ctx, data))

    ctx = pgqrs.context("demo", "test")
    run = pgqrs.run(ctx.id)
    with pytest.raises(Boom, match="simulated crash"):
        demo(ctx, "test")
    assert run.status is Status.FAILED
    assert inner(run) == {"one": "SUCCESS", "two": "FAILED"}
    assert demo(ctx, "test") == "step2_processed_test"
    assert calls == ["one", "two", "two"]
    assert run.status is Status.SUCCESS
    assert run.get(timeout=1) == "step2_processed_test"


def test_a_run_that_has_succeeded_is_not_executed_again(pgqrs: Pgqrs) -> None:
    calls: list[int] = []

    @pgqrs.workflow
    def once(ctx: Any) -> int:
        calls.append(1)
        return len(calls)

    ctx = pgqrs.context(once)
    assert [once(ctx), once(ctx), once(pgqrs.context(run=ctx.id))] == [1, 1, 1]


def test_a_step_in_a_loop_returns_each_own_value(pgqrs: Pgqrs, inner: Inner) -> None:
    calls: list[int] = []

    @pgqrs.step
    def double(ctx: Any, number: int) -> int:
        calls.append(number)
        return 2 * number

    @pgqrs.workflow
    def loop(ctx: Any) -> list[int]:
        results = [double(ctx, n) for n in (1, 2, 3)]
        if len(calls) == 3:
            calls.append(0)
            raise Boom
        return results

    ctx = pgqrs.context(loop)
    with pytest.raises(Boom):
        loop(ctx)
    assert loop(ctx) == [2, 4, 6]
    assert calls == [1, 2, 3, 0]
    assert list(inner(pgqrs.run(ctx.id))) == ["double", "double#2", "double#3"]


def test_a_skipped_step_does_not_shift_the_numbers_of_those_called_in_it(pgqrs: Pgqrs, inner: Inner) -> None:
    attempts: list[int] = []

    @pgqrs.workflow
    def nested(ctx: Any) -> list[str]:
        attempts.append(1)

        def outer() -> str:
            return ctx.step("leaf", lambda: "inside")

        values = [ctx.step("outer", outer), ctx.step("leaf", lambda: "outside")]
        if len(attempts) == 1:
            raise Boom
        return values

    ctx = pgqrs.context(nested)
    with pytest.raises(Boom):
        nested(ctx)
    assert nested(ctx) == ["inside", "outside"]
    assert set(inner(pgqrs.run(ctx.id))) == {"outer", "outer/leaf", "leaf"}


@pytest.mark.parametrize("name", ["a/b", "a#2", "https://example.org/x?y=1#z", "50 % off"])
def test_names_cannot_be_confused_with_paths_and_numbers(pgqrs: Pgqrs, name: str) -> None:
    def body(ctx: Any) -> list[str]:
        first = ctx.step("a", lambda: ctx.step("b", lambda: "nested"))
        return [first, ctx.step("a", lambda: "second"), ctx.step(name, lambda: "named")]

    workflow = pgqrs.workflow(body)
    assert workflow(pgqrs.context("body")) == ["nested", "second", "named"]


@pytest.mark.parametrize("name", ["", "x" * 600])
def test_a_name_that_cannot_be_a_key_is_refused(pgqrs: Pgqrs, name: str) -> None:
    workflow = of_one_step(pgqrs, name, lambda: 1)
    with pytest.raises(StepMisused, match="1 to 512 characters"):
        workflow(pgqrs.context("named"))


def test_a_step_named_like_its_workflow_does_not_read_the_functions_own_row(pgqrs: Pgqrs) -> None:
    workflow = of_one_step(pgqrs, "same", lambda: 7)
    assert workflow(pgqrs.context("same")) == 7


NOW = dt.datetime(2030, 2, 3, 4, 5, 6, 789, tzinfo=dt.UTC)
VALUES = [
    2**63 + 1,
    -(2**70),
    1e16,
    0.1,
    "text with \u0000 and \U0001f600",
    [1, "two", None, True],
    {"nested": {"list": [1.5]}},
    NOW,
    dt.date(2030, 1, 1),
    dt.time(1, 2, 3),
    decimal.Decimal("1.10"),
    uuid.UUID(int=7),
    b"\x00\xff",
    {"content_type": "x", "content_encoding": "y", "body": "z"},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_is_equal_on_the_first_run_and_on_every_replay(pgqrs: Pgqrs, value: Any) -> None:
    seen: list[Any] = []

    @pgqrs.workflow
    def keep(ctx: Any) -> Any:
        seen.append(ctx.step("keep", lambda: value))
        if len(seen) == 1:
            raise Boom
        return seen[-1]

    ctx = pgqrs.context(keep)
    with pytest.raises(Boom):
        keep(ctx)
    assert keep(ctx) == value
    assert seen == [value, value]
    assert {type(v) for v in seen} == {type(value)}
    assert pgqrs.run(ctx.id).get(timeout=1) == value


@pytest.mark.parametrize(("given", "kept"), [((1, 2), [1, 2]), ({1: "a"}, {"1": "a"}), ([(1,)], [[1]])], ids=repr)
def test_what_json_changes_is_changed_on_the_first_run_already(pgqrs: Pgqrs, given: Any, kept: Any) -> None:
    workflow = of_one_step(pgqrs, "keep", lambda: given)
    assert workflow(pgqrs.context("keep")) == kept


def test_not_a_number_survives(pgqrs: Pgqrs) -> None:
    first, second = of_one_step(pgqrs, "nan", lambda: [math.nan, -math.inf])(pgqrs.context("nan"))
    assert math.isnan(first)
    assert second == -math.inf


def test_a_result_that_cannot_be_recorded_names_step_and_type_and_can_be_tried_again(pgqrs: Pgqrs) -> None:
    values = iter([object(), 5])
    workflow = of_one_step(pgqrs, "odd", lambda: next(values))
    ctx = pgqrs.context("odd")
    with pytest.raises(ResultNotSerializable, match=r"step 'odd' returned a builtins.object"):
        workflow(ctx)
    assert workflow(ctx) == 5


class Refused(Exception):
    """Its constructor takes something else than it passes on."""

    def __init__(self, code: int) -> None:
        super().__init__(f"refused with {code}")
        self.code = code


def test_a_caught_error_leads_the_same_way_on_a_replay_whatever_its_constructor_takes(pgqrs: Pgqrs) -> None:
    class Local(Exception):
        pass

    def fail(error: Exception) -> None:
        raise error

    ways: list[list[str]] = []

    @pgqrs.workflow
    def flow(ctx: Any) -> None:
        ways.append([])
        for error in (Refused(7), Local("mine")):
            try:
                ctx.step("fail", fail, error)
            except Refused as caught:
                ways[-1].append(f"refused {caught.code}")
            except Local:
                ways[-1].append("local")
            except StepFailed:
                ways[-1].append("unknown")
        if len(ways) == 1:
            raise KeyboardInterrupt

    ctx = pgqrs.context(flow)
    with pytest.raises(KeyboardInterrupt):
        flow(ctx)
    with pgqrs.ledger.database.session() as session:  # an execution goes on in the generation that was cut off
        session.connection.execute(
            f"UPDATE {pgqrs.settings.schema}.pgqrs_workflow_steps SET generation = generation + 1 WHERE kind = 'inner'"
        )
    flow(ctx)
    assert ways == [["refused 7", "unknown"]] * 2


def test_the_low_level_guard_executes_skips_and_fails(pgqrs: Pgqrs, inner: Inner) -> None:
    ctx = pgqrs.context("low")
    step = ctx.acquire_step("charge")
    assert step.status == "EXECUTE"
    step.guard.fail("card declined")
    assert inner(pgqrs.run(ctx.id)) == {"charge": "FAILED"}
    again = ctx.acquire_step("charge")
    assert again.status == "EXECUTE"
    assert again.guard.success((1, 2)) == [1, 2]
    third = ctx.acquire_step("charge")
    assert (third.status, third.value) == ("SKIPPED", [1, 2])
    elsewhere = pgqrs.context(run=ctx.id).acquire_step("charge")
    assert (elsewhere.status, elsewhere.value) == ("SKIPPED", [1, 2])


def test_a_former_owners_success_and_failure_change_nothing(pgqrs: Pgqrs, inner: Inner) -> None:
    zombie = pgqrs.context("taken")
    one, two = zombie.acquire_step("one"), zombie.acquire_step("two")
    owner = pgqrs.context(run=zombie.id)
    owner.acquire_step("one").guard.success("mine")
    with pytest.raises(LeaseLost):
        one.guard.success("late")
    with pytest.raises(LeaseLost):
        two.guard.fail("late")
    with pytest.raises(LeaseLost):
        zombie.step("three", lambda: 1)
    assert inner(pgqrs.run(zombie.id)) == {"one": "SUCCESS"}
    assert pgqrs.context(run=zombie.id).acquire_step("one").value == "mine"


def test_ctx_id_is_a_number_and_can_be_called(pgqrs: Pgqrs) -> None:
    ctx = pgqrs.context("id")
    assert f"email-{ctx.id()}-7" == f"email-{ctx.id}-7"
    assert ctx.id() == ctx.id == pgqrs.run(ctx.id).id


def test_a_step_knows_its_id_for_idempotency_keys(pgqrs: Pgqrs) -> None:
    @pgqrs.workflow
    def keyed(ctx: Any) -> list[Any]:
        keys = [ctx.step("send", lambda: ctx.step_id) for _ in range(2)]
        return [*keys, ctx.step_id]

    assert keyed(pgqrs.context(keyed)) == ["send", "send#2", None]


@pytest.mark.parametrize("policy", ["warn", "error", "ignore"])
def test_a_changed_input_is_reported(new_pgqrs: Callable[..., Pgqrs], policy: str) -> None:
    pgqrs = new_pgqrs(pgqrs_on_input_change=policy)
    inputs = iter([1, 2])

    @pgqrs.step
    def square(ctx: Any, n: int) -> int:
        return n * n

    @pgqrs.workflow
    def changed(ctx: Any) -> int:
        n = next(inputs)
        value = square(ctx, n)
        if n == 1:
            raise Boom
        return value

    ctx = pgqrs.context(changed)
    with pytest.raises(Boom):
        changed(ctx)
    if policy == "error":
        with pytest.raises(InputChanged, match="step 'square'"):
            changed(ctx)
    elif policy == "warn":
        with pytest.warns(UserWarning, match="step 'square'"):
            assert changed(ctx) == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert changed(ctx) == 1


def test_steps_may_be_inserted_and_removed_between_deploys(pgqrs: Pgqrs) -> None:
    calls: list[str] = []

    def made(*names: str, fail: bool = False) -> Callable[[Any], list[str]]:
        def body(ctx: Any) -> list[str]:
            values = [ctx.step(name, lambda name=name: calls.append(name) or name) for name in names]
            if fail:
                raise Boom
            return values

        return body

    ctx = pgqrs.context("deployed")
    with pytest.raises(Boom):
        pgqrs.workflow(made("a", "b", "d", fail=True))(ctx)
    assert pgqrs.workflow(made("a", "c", "d"))(ctx) == ["a", "c", "d"]
    assert calls == ["a", "b", "d", "c"]


def test_patched_takes_the_new_way_only_in_runs_that_had_not_come_so_far(pgqrs: Pgqrs) -> None:
    def old(ctx: Any) -> Any:
        ctx.step("a", lambda: 1)
        ctx.step("b", lambda: 2)
        raise Boom

    def new(ctx: Any) -> Any:
        ctx.step("a", lambda: 1)
        taken = ctx.patched("fraud check")
        ctx.step("b", lambda: 2)
        return taken

    in_flight = pgqrs.context("patched")
    with pytest.raises(Boom):
        pgqrs.workflow(old)(in_flight)
    assert pgqrs.workflow(new)(in_flight) is False
    fresh = pgqrs.context("patched")
    assert pgqrs.workflow(new)(fresh) is True


def test_patched_stays_true_on_replays(pgqrs: Pgqrs) -> None:
    seen: list[bool] = []

    @pgqrs.workflow
    def body(ctx: Any) -> None:
        seen.append(ctx.patched("x"))
        ctx.step("after", lambda: 1)
        if len(seen) < 3:
            raise Boom

    ctx = pgqrs.context(body)
    for _ in range(2):
        with pytest.raises(Boom):
            body(ctx)
    body(ctx)
    assert seen == [True, True, True]


def test_patched_is_not_misled_by_what_was_recorded_inside_a_finished_step(pgqrs: Pgqrs) -> None:
    attempts: list[int] = []

    @pgqrs.workflow
    def body(ctx: Any) -> Any:
        ctx.step("outer", lambda: ctx.step("leaf", lambda: 1))
        attempts.append(1)
        if len(attempts) == 1:
            raise Boom
        return ctx.patched("later")

    ctx = pgqrs.context(body)
    with pytest.raises(Boom):
        body(ctx)
    assert body(ctx) is True


def test_patched_inside_a_step_looks_at_that_step_only(pgqrs: Pgqrs) -> None:
    def body(new: bool) -> Callable[[Any], Any]:
        def outer(ctx: Any) -> Any:
            taken = ctx.patched("inside") if new else None
            ctx.step("leaf", lambda: 1)
            if not new:
                raise Boom
            return taken

        return lambda ctx: ctx.step("outer", outer, ctx)

    in_flight, fresh = pgqrs.context("patched"), pgqrs.context("patched")
    with pytest.raises(Boom):
        inline.call(body(new=False), in_flight, (), {})
    assert inline.call(body(new=True), in_flight, (), {}) is False
    assert inline.call(body(new=True), fresh, (), {}) is True


def test_a_workflow_key_finds_the_same_run_again(pgqrs: Pgqrs) -> None:
    first = pgqrs.context("keyed", 1, workflow_key="k")
    assert pgqrs.context("keyed", 1, workflow_key="k").id == first.id
    with pytest.raises(WorkflowKeyConflict):
        pgqrs.context("other", 1, workflow_key="k")


def test_a_cancelled_run_executes_nothing_more(pgqrs: Pgqrs) -> None:
    calls: list[int] = []

    @pgqrs.workflow
    def body(ctx: Any) -> None:
        calls.append(ctx.step("first", lambda: 1))
        pgqrs.run(ctx.id).cancel()
        calls.append(ctx.step("second", lambda: 2))

    ctx = pgqrs.context(body)
    with pytest.raises(LeaseLost):
        body(ctx)
    assert calls == [1]
    assert pgqrs.run(ctx.id).status is Status.CANCELLED
    with pytest.raises(RunStateError, match="CANCELLED"):
        body(ctx)


def test_async_steps_run_in_order_and_at_once(pgqrs: Pgqrs, inner: Inner) -> None:
    calls: list[int] = []

    @pgqrs.step
    async def fetch(ctx: Any, n: int) -> int:
        await asyncio.sleep(0)
        calls.append(n)
        return n

    @pgqrs.step
    def plain(ctx: Any, n: int) -> int:
        return -n

    @pgqrs.workflow
    async def body(ctx: Any) -> Any:
        together = await asyncio.gather(*(fetch(ctx, n) for n in range(3)))
        one = await plain(ctx, 9)
        step = await ctx.acquire_step("low")
        low = await step.guard.success(5) if step.status == "EXECUTE" else step.value
        if len(calls) == 3:
            calls.append(3)
            raise Boom
        return [*together, one, low, await ctx.step("coroutine", fetch.function, ctx, 7)]

    ctx = pgqrs.context(body)
    with pytest.raises(Boom):
        asyncio.run(body(ctx))
    assert asyncio.run(body(ctx)) == [0, 1, 2, -9, 5, 7]
    assert sorted(calls) == [0, 1, 2, 3, 7]
    assert set(inner(pgqrs.run(ctx.id))) == {"fetch", "fetch#2", "fetch#3", "plain", "low", "coroutine"}


def test_an_async_step_in_a_plain_workflow_is_refused(pgqrs: Pgqrs) -> None:
    @pgqrs.step
    async def fetch(ctx: Any) -> int:
        return 1

    @pgqrs.workflow
    def body(ctx: Any) -> Any:
        return fetch(ctx)

    with pytest.raises(StepMisused, match="async def"):
        body(pgqrs.context(body))


def test_a_step_called_without_the_context_says_so(pgqrs: Pgqrs) -> None:
    @pgqrs.step
    def fetch(ctx: Any, url: str) -> str:
        return url

    with pytest.raises(StepMisused, match="context first, not with str"):
        fetch("https://example.org")


def test_in_a_worker_a_run_is_started_followed_and_read(pgqrs: Pgqrs, working: Working, inner: Inner) -> None:
    @pgqrs.step
    def fetch(ctx: Any, url: str) -> str:
        return url.upper()

    @pgqrs.workflow
    def pipeline(ctx: Any, url: str, *, times: int = 1) -> list[str]:
        return [fetch(ctx, url) for _ in range(times)]

    run = pipeline.apply_async(("x",), {"times": 2}, workflow_key="order-1")
    assert pipeline.apply_async(("x",), {"times": 2}, workflow_key="order-1") == run
    with pytest.raises(TypeError):
        pipeline.delay("x", "too many")
    with working():
        assert run.get(timeout=60) == ["X", "X"]
        assert run.result.get(timeout=60) == ["X", "X"]
    assert [(s.step_id, s.kind) for s in run.steps()] == [
        ("pipeline()", "function"),
        ("fetch", "inner"),
        ("fetch#2", "inner"),
    ]
    assert run.record.name == "pipeline"


def test_in_a_worker_a_failed_function_resumes_past_its_finished_steps(
    pgqrs: Pgqrs, working: Working, inner: Inner
) -> None:
    calls: list[str] = []

    @pgqrs.workflow
    async def pipeline(ctx: Any) -> str:
        await ctx.step("one", lambda: calls.append("one"))
        await ctx.step("two", two)
        return "done"

    def two() -> None:
        calls.append("two")
        if calls.count("two") == 1:
            raise Boom("first time")

    with working():
        run = ended(pipeline.delay())
        assert run.status is Status.FAILED
        with pytest.raises(Boom, match="first time"):
            run.get(timeout=1)
        assert inner(run) == {"one": "SUCCESS", "two": "FAILED"}
        assert run.resume().get(timeout=60) == "done"
    assert calls == ["one", "two", "two"]


def test_a_retried_function_executes_failed_steps_again_and_keeps_finished_ones(pgqrs: Pgqrs, working: Working) -> None:
    calls: list[str] = []

    @pgqrs.workflow(autoretry_for=(Boom,), retry_kwargs={"max_retries": 3, "countdown": 0.1})
    def retried(ctx: Any) -> list[str]:
        ctx.step("one", lambda: calls.append("one"))
        ctx.step("two", two)
        return calls

    def two() -> None:
        calls.append("two")
        if calls.count("two") < 3:
            raise Boom

    with working():
        assert retried.delay().get(timeout=60) == ["one", "two", "two", "two"]


def test_two_functions_in_one_group_keep_their_steps_apart(pgqrs: Pgqrs, working: Working, inner: Inner) -> None:
    @pgqrs.workflow
    def count(ctx: Any, start: int) -> int:
        return sum(ctx.step("next", lambda n=n: start + n) for n in range(2))

    from celery import group

    with working():
        result = group(count.s(10), count.s(20)).apply_async()
        assert result.get(timeout=60) == [21, 41]
    run = pgqrs.run_of(result)
    assert run is not None
    assert len(inner(run)) == 4


def test_a_function_in_a_chain_keeps_its_steps_apart_from_the_chains(pgqrs: Pgqrs, working: Working) -> None:
    @pgqrs.task(shared=False)
    def fetch(value: int) -> int:
        return value + 1

    @pgqrs.workflow
    def first(ctx: Any, value: int) -> int:
        return ctx.step("fetch", lambda: value * 10)

    with working():
        run = pgqrs.workflow("mixed", first.s() | fetch.s()).delay(4)
        assert run.get(timeout=60) == 41
    assert {s.step_id for s in run.steps()} == {"first", "first/fetch", "fetch"}


def test_10000_steps_do_not_grow_the_memory(pgqrs: Pgqrs) -> None:
    sizes: list[int] = []

    @pgqrs.workflow
    def long(ctx: Any) -> int:
        total = 0
        for n in range(10_000):
            total += len(ctx.step("chunk", lambda: "x" * 500))
            if n % 3000 == 1000:
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        return total

    tracemalloc.start()
    try:
        assert long(pgqrs.context(long)) == 5_000_000
    finally:
        tracemalloc.stop()
    assert len(sizes) == 3
    assert sizes[-1] - sizes[0] < 200_000, "6 000 steps of 500 bytes left something behind"


def test_eager_calls_execute_a_run_of_their_own(pgqrs: Pgqrs) -> None:
    @pgqrs.workflow
    def body(ctx: Any, n: int) -> int:
        return ctx.step("plus", lambda: n + 1)

    assert body.task.apply((1,)).get() == 2
