"""What a worker and its relay make of what somebody else has left behind, and of what goes wrong on the way."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError

from pgqrs_celery.exceptions import NotDurable, PoisonedStep
from pgqrs_celery.guard import StepGuard
from pgqrs_celery.session import Session
from pgqrs_celery.store import steps
from pgqrs_celery.store.steps import Verdict
from tests.support.bench import TIMEOUT, Bench
from tests.support.waiting import wait_for


def taken_by_another(bench: Bench, task_id: str) -> StepGuard:
    """A worker that is not here has acquired a step."""
    decision = StepGuard.acquire(bench.shop.pgqrs.ledger, task_id)
    assert decision.guard is not None
    return decision.guard


def make_due(bench: Bench, task_id: str) -> None:
    """Let the time of one step have come, and call the relay."""
    bench.shop.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET due_at = {schema}.pgqrs_now() - interval '1 s' WHERE task_id = %s",
        [task_id],
    )
    bench.call_relay()


def test_the_hand_off_of_a_finished_step_is_repeated_without_its_body(bench: Bench) -> None:
    result = chain(bench.add.s(1, 2), bench.add.s(10)).apply_async(
        countdown=1000, link_error=bench.note_task.si("errback")
    )
    first = result.parent
    guard = taken_by_another(bench, first.id)
    assert guard.succeed("777")
    make_due(bench, first.id)
    assert result.get(TIMEOUT) == 787
    assert first.get(TIMEOUT) == 777
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert bench.journal == {"add 777 10": 1}
    assert [step.attempt for step in run.steps()] == [1, 1]


def test_the_consequences_of_a_failure_happen_though_its_owner_died(bench: Bench) -> None:
    result = chain(bench.add.s(1, 2), bench.add.s(10)).apply_async(
        countdown=1000, link_error=bench.note_task.si("errback")
    )
    first = result.parent
    error = {"exc_type": "ValueError", "exc_message": ["left behind"], "exc_module": "builtins"}
    assert taken_by_another(bench, first.id).fail(json.dumps(error))
    make_due(bench, first.id)
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    with pytest.raises(ValueError, match="left behind"):
        first.get(TIMEOUT)
    with pytest.raises(ValueError, match="left behind"):
        run.get(TIMEOUT)
    wait_for(lambda: bench.journal["note errback"], TIMEOUT)
    assert bench.journal == {"note errback": 1}


def test_a_step_that_has_killed_too_many_workers_fails_with_its_consequences(bench: Bench) -> None:
    result = chain(bench.add.s(1, 2), bench.add.s(10)).apply_async(
        countdown=1000, link_error=bench.note_task.si("errback")
    )
    first = result.parent
    ledger = bench.shop.pgqrs.ledger
    worker_id = ledger.worker_id
    assert worker_id is not None

    def kill_five(session: Session) -> None:
        # In one transaction: between two deaths the bench's own worker might take the step.
        for _ in range(5):
            taken = steps.acquire(
                session,
                first.id,
                generation=0,
                lease_token=uuid4(),
                worker_id=worker_id,
                lease=30.0,
                max_lost=5,
                poison=ledger.poison,
                may_judge=True,
            )
            assert taken is not None
            assert taken.verdict == Verdict.EXECUTE
            steps.bereave(session, first.id, worker_id=worker_id, max_lost=5, poison=ledger.poison)

    ledger.call(kill_five, transaction=True)
    bench.call_relay()
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    with pytest.raises(PoisonedStep, match=r"killed its worker 5 times \(pgqrs_max_lost\)"):
        first.get(TIMEOUT)
    with pytest.raises(PoisonedStep):
        run.get(TIMEOUT)
    wait_for(lambda: bench.journal["note errback"], TIMEOUT)
    assert run.resume().get(TIMEOUT) == 13
    assert bench.journal == {"note errback": 1, "add 1 2": 1, "add 3 10": 1}


def test_a_step_somebody_executes_is_left_to_him(bench: Bench) -> None:
    result = bench.add.apply_async((1, 2), countdown=1000)
    guard = taken_by_another(bench, result.id)
    bench.send_again(result.id)
    bench.echo.delay("behind it").get(TIMEOUT)
    assert bench.journal == {"echo behind it": 1}
    assert guard.succeed("5")


def test_a_hand_off_that_fails_for_the_moment_is_repeated(bench: Bench) -> None:
    refusals: list[str] = []

    def router(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **rest: Any) -> None:
        if name == "shop.note" and len(refusals) < 2:
            refusals.append(name)
            raise PassingError("not now")

    reroute(bench, router)
    try:
        result = chain(bench.add.s(1, 2), bench.note_task.s()).delay()
        for tries in (1, 2):
            wait_for(lambda: len(refusals) == tries, TIMEOUT)  # noqa: B023
            wait_for(lambda: bench.shop.step(result.parent.id).error, TIMEOUT)
            step = bench.shop.step(result.parent.id)
            assert (step.status, step.open) == ("SUCCESS", True)
            assert json.loads(step.error or "")["exc_type"] == "PassingError"
            make_due(bench, result.parent.id)
        assert result.get(TIMEOUT) == "noted"
    finally:
        reroute(bench, None)
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert bench.shop.step(result.parent.id).error is None
    assert bench.journal == {"add 1 2": 1, "note 3": 1}


class PassingError(Exception):
    """Something that is better the next time."""


def reroute(bench: Bench, router: Any) -> None:
    """Let everything that is sent be routed by this function."""
    app: Any = bench.shop.app
    app.conf.task_routes = router
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()


def test_a_revoked_task_cancels_its_run(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.add.s(2)).apply_async(countdown=1000)
    first = result.parent
    bench.worker.state.revoked.add(first.id)
    make_due(bench, first.id)
    run = bench.run_of(result)
    assert bench.ended(run) == "CANCELLED"
    with pytest.raises(TaskRevokedError):
        first.get(TIMEOUT)
    wait_for(lambda: result.state == "REVOKED", TIMEOUT)
    assert bench.journal == {}


def test_a_retry_may_change_its_arguments(bench: Bench) -> None:
    @bench.task(bind=True, name="shop.changes")
    def changes(self: Any, value: int) -> int:
        bench.note(f"changes {value}")
        if value < 3:
            raise self.retry(args=(value + 1,), countdown=0)
        return value

    result = chain(changes.s(1), bench.add.s(10)).delay()
    assert result.get(TIMEOUT) == 13
    assert bench.journal == {"changes 1": 1, "changes 2": 1, "changes 3": 1, "add 3 10": 1}


def test_an_exception_of_the_user_s_own_comes_back_as_it_was(bench: Bench) -> None:
    @bench.task(name="shop.special")
    def special() -> None:
        raise SpecialError(3, "b")

    result = special.delay()
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    for wait in (result.get, run.get):
        with pytest.raises(SpecialError) as caught:
            wait(TIMEOUT)
        assert caught.value.args == (3, "b")


class SpecialError(Exception):
    """An error with arguments of its own."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(code, detail)


def test_a_canvas_a_body_sends_again_after_a_failure_is_executed_once(bench: Bench) -> None:
    @bench.task(name="shop.fans")
    def fans() -> str:
        chain(bench.add.s(1), bench.add.s(1)).delay()
        group(bench.echo.s("x"), bench.echo.s("y")).apply_async()
        if "fans" in bench.broken:
            raise ValueError("too early")
        return "done"

    bench.broken.add("fans")
    run = bench.run_of(fans.delay())
    assert bench.ended(run) == "FAILED"
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == "done"
    assert bench.ended(run) == "SUCCESS"
    assert bench.journal == {"add 1 0": 1, "add 1 1": 1, "echo x": 1, "echo y": 1}
    assert len(run.steps()) == 5


def test_callbacks_of_a_chain_belong_to_its_last_link(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.add.s(2)).apply_async(link=bench.note_task.s())
    assert result.get(TIMEOUT) == 3
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert bench.journal == {"add 1 0": 1, "add 1 2": 1, "note 3": 1}


@pytest.mark.parametrize("kind", ["group", "chord"])
def test_a_task_may_be_replaced_by_a_canvas_that_joins(bench: Bench, kind: str) -> None:
    @bench.task(bind=True, name="shop.joins")
    def joins(self: Any) -> Any:
        members = [bench.add.s(n, n) for n in range(3)]
        raise self.replace(group(members) if kind == "group" else chord(members, bench.total.s()))

    result = chain(joins.s(), bench.echo.s()).delay()
    run = bench.run_of(result)
    if bench.shop.app.conf.result_backend.startswith("redis"):
        with pytest.raises(NotDurable, match="belongs to a chord"):
            run.get(TIMEOUT)
        return
    assert result.get(TIMEOUT) == ([0, 2, 4] if kind == "group" else 6)
    assert bench.ended(run) == "SUCCESS"
    assert {step.status for step in run.steps()} == {"SUCCESS"}
