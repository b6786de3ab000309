"""Named workflows: started with a key, followed, resumed, cancelled, paused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import chain, group

from pgqrs_celery.exceptions import (
    NotDurable,
    RunCancelled,
    RunNotFound,
    RunStateError,
    RunTimeout,
    WorkflowKeyConflict,
)
from pgqrs_celery.states import Status
from pgqrs_celery.workflow import Workflow
from tests.support.bench import TIMEOUT, Bench
from tests.support.waiting import wait_for


def workflow(bench: Bench, canvas: Any = None, name: str = "fulfil") -> Workflow:
    made: Workflow = bench.shop.pgqrs.workflow(name, canvas if canvas is not None else bench.add.s() | bench.add.s(10))
    return made


def parked(bench: Bench) -> Any:
    """A task in a queue nobody listens to."""
    return bench.add.s(1).set(queue="nobody-listens")


def test_a_run_is_started_followed_and_read_from_the_ledger(bench: Bench) -> None:
    run = workflow(bench).delay(1, 2)
    assert run.get(TIMEOUT) == 13
    assert run.status is Status.SUCCESS
    assert [(step.step_id, step.status) for step in run.steps()] == [("add", "SUCCESS"), ("add#2", "SUCCESS")]
    assert run.record.name == "fulfil"
    assert json.loads(run.record.input or "") == {"args": [1, 2], "kwargs": {}}
    assert run.result is not None
    assert run.result.get(TIMEOUT) == 13
    assert bench.shop.pgqrs.run(run.id) == run
    assert run in {bench.shop.pgqrs.run(run.id)}


def test_the_same_key_is_the_same_run_and_nothing_starts_twice(bench: Bench) -> None:
    fulfil = workflow(bench)
    first = fulfil.apply_async((3, 4), workflow_key="order-1")
    assert fulfil.apply_async((3, 4), workflow_key="order-1") == first
    assert first.get(TIMEOUT) == 17
    again = fulfil.apply_async((3, 4), workflow_key="order-1")
    assert again == first
    assert again.get(TIMEOUT) == 17
    assert bench.journal["add 3 4"] == 1


def test_runs_without_a_key_are_different_runs(bench: Bench) -> None:
    fulfil = workflow(bench)
    assert fulfil.delay(1, 1) != fulfil.delay(1, 1)


def test_a_key_with_other_arguments_is_a_conflict_that_names_both(bench: Bench) -> None:
    fulfil = workflow(bench)
    run = fulfil.apply_async((5,), workflow_key="order-2")
    with pytest.raises(WorkflowKeyConflict) as caught:
        fulfil.apply_async((6,), workflow_key="order-2")
    message = str(caught.value)
    assert f"'order-2' belongs to run {run.id} of workflow 'fulfil'" in message
    assert '"args": [5]' in message
    assert '"args": [6]' in message
    with pytest.raises(WorkflowKeyConflict, match="cannot start workflow 'other'"):
        workflow(bench, name="other").apply_async((5,), workflow_key="order-2")
    run.get(TIMEOUT)
    assert bench.journal["add 6 0"] == 0


def test_resume_runs_only_what_failed(bench: Bench) -> None:
    @bench.task(name="shop.charge")
    def charge(value: int) -> int:
        bench.note("charge")
        if "charge" in bench.broken:
            raise ConnectionError("payment down")
        return value + 100

    bench.broken.add("charge")
    run = workflow(bench, bench.add.s() | charge.s() | bench.add.s(1)).apply_async((1, 2), workflow_key="order-3")
    with pytest.raises(ConnectionError, match="payment down"):
        run.get(TIMEOUT)
    assert run.status is Status.FAILED
    assert run.get(TIMEOUT, propagate=False) is None
    failed = run.result
    assert failed is not None
    with pytest.raises(ConnectionError):
        failed.get(TIMEOUT)
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == 104
    succeeded = run.result
    assert succeeded is not None
    assert succeeded.get(TIMEOUT) == 104
    assert [(step.step_id, step.status, step.attempt) for step in run.steps()] == [
        ("add", "SUCCESS", 1),
        ("charge", "SUCCESS", 2),
        ("add#2", "SUCCESS", 1),
    ]
    assert (bench.journal["add 1 2"], bench.journal["charge"]) == (1, 2)
    assert workflow(bench, bench.add.s() | charge.s()).apply_async((1, 2), workflow_key="order-3") == run


def test_a_failed_member_of_a_group_is_resumed_alone(bench: Bench) -> None:
    @bench.task(name="shop.maybe")
    def maybe(value: int) -> int:
        bench.note(f"maybe {value}")
        if value == 2 and "maybe" in bench.broken:
            raise ValueError("not now")
        return value * 10

    bench.broken.add("maybe")
    run = workflow(bench, group(maybe.s(n) for n in (1, 2, 3))).delay()
    assert bench.ended(run) == "FAILED"
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == [10, 20, 30]
    assert bench.journal == {"maybe 1": 1, "maybe 2": 2, "maybe 3": 1}


@pytest.mark.parametrize("state", ["SUCCESS", "CANCELLED", "QUEUED"])
def test_only_a_failed_run_can_be_resumed(bench: Bench, state: str) -> None:
    run = workflow(bench, parked(bench) if state != "SUCCESS" else None).delay(*([1] if state == "SUCCESS" else []))
    if state == "SUCCESS":
        run.get(TIMEOUT)
    elif state == "CANCELLED":
        run.cancel()
    with pytest.raises(RunStateError, match=rf"run {run.id} is {state}; only a FAILED run can be resumed"):
        run.resume()


def test_cancel_ends_a_run_and_stores_revoked_for_what_never_ran(bench: Bench) -> None:
    run = workflow(bench, chain(bench.add.s(1), parked(bench), bench.add.s(2), bench.add.s(3))).delay()
    wait_for(lambda: len(run.steps()) == 2, TIMEOUT)
    wait_for(lambda: run.steps()[0].status == "SUCCESS", TIMEOUT)
    result = run.result
    assert result is not None
    assert run.cancel() == run
    with pytest.raises(RunCancelled, match=f"run {run.id} was cancelled"):
        run.get(TIMEOUT)
    assert run.get(TIMEOUT, propagate=False) is None
    assert run.status is Status.CANCELLED
    wait_for(lambda: not [step for step in run.steps() if step.open], TIMEOUT, "the cancelled steps to be announced")
    assert [step.status for step in run.steps()] == ["SUCCESS", "CANCELLED"]
    app = bench.shop.app
    assert app.AsyncResult(run.steps()[0].task_id).state == "SUCCESS"
    assert app.AsyncResult(run.steps()[1].task_id).state == "REVOKED"
    assert app.AsyncResult(result.id).state == "REVOKED"
    with pytest.raises(RunStateError, match=f"run {run.id} is CANCELLED"):
        run.pause()


def test_a_message_of_a_cancelled_run_is_not_executed(bench: Bench) -> None:
    run = workflow(bench, bench.echo.s("never").set(queue="later")).delay()
    run.cancel()
    (message,) = bench.shop.messages("later")
    with bench.shop.app.connection_for_write() as connection:
        connection.Producer().publish(
            (message.args, message.kwargs, message.embed), headers=message.headers, routing_key="celery",
            serializer="json", correlation_id=message.id,
        )  # fmt: skip
    bench.echo.delay("behind it").get(TIMEOUT)
    assert bench.journal["echo never"] == 0


def test_a_body_that_runs_while_its_run_is_cancelled_is_not_recorded_and_nothing_follows(bench: Bench) -> None:
    @bench.task(name="shop.suicidal")
    def suicidal(workflow_key: str) -> str:
        bench.shop.pgqrs.run(int(bench.shop.runs()[-1].workflow_id)).cancel()
        bench.note("went on")
        return "too late"

    run = workflow(bench, suicidal.s() | bench.echo.s()).delay("x")
    assert bench.ended(run) == "CANCELLED"
    wait_for(lambda: bench.journal["went on"], TIMEOUT)
    wait_for(lambda: not [step for step in run.steps() if step.open], TIMEOUT, "the cancelled step to be announced")
    assert [step.status for step in run.steps()] == ["CANCELLED"]
    assert bench.journal["echo too late"] == 0
    assert bench.shop.app.AsyncResult(run.steps()[0].task_id).state == "REVOKED"


@pytest.mark.parametrize("state", ["SUCCESS", "FAILED"])
def test_a_run_that_has_ended_cannot_be_cancelled_or_paused(bench: Bench, state: str) -> None:
    run = workflow(bench, bench.echo.s(1) if state == "SUCCESS" else bench.fails.s()).delay()
    assert bench.ended(run) == state
    with pytest.raises(RunStateError, match=f"run {run.id} is {state}; it cannot be cancelled"):
        run.cancel()
    with pytest.raises(RunStateError, match=f"run {run.id} is {state}; it cannot be paused"):
        run.pause()


def test_a_cancel_may_be_said_twice(bench: Bench) -> None:
    run = workflow(bench, parked(bench)).delay()
    run.cancel()
    run.cancel()
    assert run.status is Status.CANCELLED


def test_a_paused_run_begins_nothing_until_it_is_continued(bench: Bench) -> None:
    @bench.task(name="shop.pauses")
    def pauses() -> str:
        bench.shop.pgqrs.run(int(bench.shop.runs()[-1].workflow_id)).pause()
        return "paused"

    run = workflow(bench, pauses.s() | bench.echo.s()).delay()
    wait_for(lambda: [step.due_at for step in run.steps()] == [None, None], TIMEOUT, "the second step to be parked")
    assert [step.status for step in run.steps()] == ["SUCCESS", "QUEUED"]
    assert run.status is not Status.SUCCESS
    assert run.record.paused_at is not None
    assert bench.journal["echo paused"] == 0
    assert run.unpause() == run
    assert run.get(TIMEOUT) == "paused"
    assert run.record.paused_at is None
    with pytest.raises(RunStateError, match=f"run {run.id} is not paused"):
        run.unpause()


def test_waiting_for_a_run_ends_with_the_time_given(bench: Bench) -> None:
    run = workflow(bench, parked(bench)).delay()
    with pytest.raises(RunTimeout, match=rf"run {run.id} is still QUEUED after 0\.2 s"):
        run.get(0.2)
    with pytest.raises(TimeoutError):
        run.get(0)


def test_a_run_that_does_not_exist_says_so(bench: Bench) -> None:
    with pytest.raises(RunNotFound, match="run 4711 does not exist"):
        _ = bench.shop.pgqrs.run(4711).status
    with pytest.raises(RunNotFound, match="run 4711"):
        bench.shop.pgqrs.run(4711).resume()
    assert bench.shop.pgqrs.run_of("nobody") is None


def test_a_group_returns_a_list_and_a_chain_of_groups_its_last(bench: Bench) -> None:
    assert workflow(bench, group(bench.add.s(n, n) for n in range(3))).delay().get(TIMEOUT) == [0, 2, 4]
    fan = workflow(bench, chain(bench.add.s(1), group(bench.add.s(1), bench.add.s(2))))
    assert sorted(fan.delay().get(TIMEOUT)) == [2, 3]


def test_a_single_task_is_a_workflow_too(bench: Bench) -> None:
    run = workflow(bench, bench.add.s()).apply_async((1,), {"y": 2}, labels={"customer": "7"})
    assert run.get(TIMEOUT) == 3
    labels = bench.shop.execute("SELECT labels FROM {schema}.pgqrs_workflows WHERE workflow_id = %s", [run.id])
    assert json.loads(labels[0][0]) == {"customer": "7"}


def test_a_workflow_that_begins_with_an_ordinary_task_is_refused(bench: Bench) -> None:
    with pytest.raises(NotDurable, match="workflow 'fulfil' begins with a task that is not durable"):
        workflow(bench, bench.plain.s("refused") | bench.echo.s()).delay()
    bench.echo.delay("behind it").get(TIMEOUT)
    assert bench.journal == {"echo behind it": 1}, "nothing of it was sent"


def test_an_ordinary_task_in_a_workflow_is_an_ordinary_link(bench: Bench) -> None:
    run = workflow(bench, bench.add.s() | bench.plain.s() | bench.add.s(5)).delay(1)
    assert run.get(TIMEOUT) == 6
    assert [step.step_id for step in run.steps()] == ["add", "add#2"]
    assert bench.journal["plain 1"] == 1


def test_starting_a_workflow_does_not_change_its_canvas(bench: Bench) -> None:
    canvas = bench.add.s(1) | bench.add.s(2)
    before = json.dumps(canvas)
    fulfil = workflow(bench, canvas)
    assert fulfil.delay().get(TIMEOUT) == 3
    assert fulfil.delay().get(TIMEOUT) == 3
    assert json.dumps(canvas) == before


def test_a_workflow_started_in_a_body_is_a_run_of_its_own(bench: Bench) -> None:
    inner = workflow(bench, bench.add.s(), name="inner")

    @bench.task(name="shop.outer")
    def outer() -> int:
        return inner.apply_async((20, 3), workflow_key="inner-1").id

    run = workflow(bench, outer.s(), name="outer").delay()
    child = bench.shop.pgqrs.run(run.get(TIMEOUT))
    assert child != run
    assert child.get(TIMEOUT) == 23
    assert [step.step_id for step in run.steps()] == ["outer"]


def test_options_of_the_call_reach_the_tasks(bench: Bench) -> None:
    run = workflow(bench).apply_async((1,), queue="elsewhere")
    (message,) = bench.shop.messages("elsewhere")
    assert message.args == [1]
    run.cancel()
    delayed = workflow(bench).apply_async((1,), countdown=1000)
    assert [step.due_at is not None for step in delayed.steps()] == [True]
    assert bench.shop.messages("elsewhere") == []
    delayed.cancel()
