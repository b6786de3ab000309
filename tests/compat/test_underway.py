"""underway's model: typed steps in a row, activities, a runtime in the process."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from celery import Celery
from pydantic import BaseModel

from pgqrs_celery import ConfigurationError, NotDurable, Pgqrs, RunStateError, StepMisused
from pgqrs_celery.compat import underway_builder
from pgqrs_celery.compat.underway import (
    Activity,
    ActivityError,
    Enqueued,
    InvalidInput,
    RetryPolicy,
    StepContext,
    TaskError,
    To,
    Workflow,
    WorkflowBuilder,
    activity_id,
)
from pgqrs_celery.states import TERMINAL
from tests.compat.conftest import Program
from tests.support.waiting import wait_for

QUICK = RetryPolicy(max_attempts=3, initial_interval=0.01, jitter_factor=0.0)


@dataclass
class Resize:
    asset: int
    widths: list[int]


class Publish(BaseModel):
    key: str


calls: Counter[str] = Counter()
gate = threading.Event()


@pytest.fixture(autouse=True)
def _nothing_called() -> None:
    calls.clear()
    gate.clear()


@pytest.fixture
def pgqrs(database_dsn: str, installed_schema: str, redis_url: str) -> Iterator[Pgqrs]:
    app = Celery("underway-tests", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(
        pgqrs_dsn=database_dsn,
        pgqrs_schema=installed_schema,
        pgqrs_lease=5.0,
        pgqrs_relay_interval=1.0,
        pgqrs_watch_interval=0.2,
        pgqrs_resend_interval=2.0,
        broker_connection_retry_on_startup=True,
    )
    made = Pgqrs(app)
    yield made
    made.ledger.database.close()
    app.close()


@pytest.fixture
def builder(pgqrs: Pgqrs) -> WorkflowBuilder:
    return Workflow.builder().app(pgqrs).retry(QUICK)


def executed(workflow: Workflow, value: Any = None) -> Any:
    """Execute one run of a workflow in this process and return its result."""
    run = workflow.enqueue(value)
    handle = workflow.runtime().start()
    try:
        return run.get(timeout=60)
    finally:
        assert handle.shutdown(timeout=60)


def steps_of(run: Enqueued) -> dict[str, str]:
    return {step.step_id: step.status for step in run.steps()}


def resize(cx: StepContext, job: Resize) -> To:
    calls[f"resize {type(job).__name__} {job.widths}"] += 1
    return To.next(Publish(key=f"images/{job.asset}.webp"))


def publish(cx: StepContext, image: Publish) -> To:
    calls[f"publish {type(image).__name__}"] += 1
    return To.done(image.key)


async def publish_async(cx: StepContext, image: Publish) -> To:
    await asyncio.sleep(0)
    return publish(cx, image)


@pytest.mark.parametrize("last", [publish, publish_async])
def test_the_output_of_a_step_is_the_typed_input_of_the_next(
    builder: WorkflowBuilder, last: Callable[..., Any]
) -> None:
    workflow = builder.step(resize).step(last).name("images").build()
    assert executed(workflow, Resize(42, [100, 200])) == "images/42.webp"
    assert calls == {"resize Resize [100, 200]": 1, "publish Publish": 1}


def test_a_wrong_input_is_refused_where_it_is_given(builder: WorkflowBuilder, pgqrs: Pgqrs) -> None:
    workflow = builder.step(resize).step(publish).name("images").build()
    wrong: Any = "many"
    for value in (Resize(42, wrong), {"asset": 42}, 7, None):
        with pytest.raises(InvalidInput, match="step 'resize' of workflow 'images' takes Resize"):
            workflow.enqueue(value)
    with pytest.raises(InvalidInput, match="widths"):
        workflow.enqueue(Resize(42, wrong))
    assert pgqrs.monitor.runs(app=pgqrs.ledger.app) == []


def wrong_next(cx: StepContext, n: int) -> To:
    calls["wrong"] += 1
    return To.next({"name": n})


def test_a_step_that_passes_on_what_the_next_does_not_take_fails_at_once(builder: WorkflowBuilder) -> None:
    workflow = builder.step(wrong_next).step(publish).name("wrong").build()
    with pytest.raises(InvalidInput, match="key"):
        executed(workflow, 1)
    assert calls == {"wrong": 1}


def stop_early(cx: StepContext, n: int) -> To:
    return To.done(n) if n < 10 else To.next(n)


def never(cx: StepContext, n: int) -> To:
    calls["never"] += 1
    return To.done()


def test_done_ends_a_workflow_before_its_last_step(builder: WorkflowBuilder) -> None:
    workflow = builder.step(stop_early).step(never).name("early").build()
    assert executed(workflow, 3) == 3
    assert not calls


def later(cx: StepContext, n: int) -> To:
    return To.next(n + 1, delay=0.5)


def last(cx: StepContext, n: int) -> To:
    calls["last"] += 1
    return To.done(n)


def test_a_delayed_transition_waits_in_the_ledger(builder: WorkflowBuilder) -> None:
    workflow = builder.step(later).step(last).name("later").build()
    run = workflow.enqueue(1)
    handle = workflow.runtime().start()
    try:
        assert run.get(timeout=60) == 2
    finally:
        handle.shutdown()
    [delay] = [step for step in run.steps() if step.step_id == "last/delay"]
    [ended] = [step for step in run.steps() if step.step_id == "last"]
    assert delay.created_at
    assert ended.completed_at
    assert (ended.completed_at - delay.created_at).total_seconds() >= 0.5
    assert ended.attempt == 1  # a suspension is no attempt


class Lookup(Activity):
    NAME = "lookup"
    Input = int
    Output = str

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def execute(self, user: int) -> str:
        calls["lookup"] += 1
        if user == 0:
            raise ActivityError.fatal("missing_user", f"no user {user}")
        if user == 1 and calls["lookup"] < 3:
            raise ActivityError.retryable("busy", "later")
        if user == 2:
            raise ActivityError.retryable("busy", "never")
        return f"{user}@{self.domain}"


Lookup.RETRY = QUICK


class Track(Activity):
    NAME = "track"
    Input = str
    Output = None

    async def execute(self, mail: str) -> None:
        assert activity_id()
        calls[f"track {mail}"] += 1


def greet(cx: StepContext, user: int) -> To:
    calls["greet"] += 1
    mail = cx.call(Lookup, "lookup", user)
    cx.emit(Track, "track", mail)
    return To.done(mail)


async def greet_async(cx: StepContext, user: int) -> To:
    calls["greet"] += 1
    mail = await cx.call(Lookup, "lookup", user)
    await cx.emit(Track, "track", mail)
    return To.done(mail)


def greeting(builder: WorkflowBuilder, step: Callable[..., Any] = greet) -> Workflow:
    return builder.activity(Lookup("example.org")).activity(Track).step(step).name("greeting").build()


@pytest.mark.parametrize("step", [greet, greet_async])
def test_a_call_suspends_its_step_and_its_output_is_recorded(
    builder: WorkflowBuilder, step: Callable[..., Any]
) -> None:
    workflow = greeting(builder, step)
    run = workflow.enqueue(7)
    handle = workflow.runtime().start()
    try:
        assert run.get(timeout=60) == "7@example.org"
        wait_for(lambda: run.status in TERMINAL, 60, "the run to end, with what was emitted")
    finally:
        handle.shutdown()
    assert calls["lookup"] == calls["track 7@example.org"] == 1
    assert calls["greet"] in (1, 2)  # once more after the suspension, unless the answer came before it
    assert {step.step_id: step.attempt for step in run.steps()}[step.__name__] == 1


def test_an_activity_is_tried_again_after_a_retryable_error(builder: WorkflowBuilder) -> None:
    assert executed(greeting(builder), 1) == "1@example.org"
    assert calls["lookup"] == 3


@pytest.mark.parametrize(("user", "code", "attempts"), [(0, "missing_user", 1), (2, "busy", 3)])
def test_a_fatal_or_exhausted_activity_ends_the_run_with_its_error(
    builder: WorkflowBuilder, user: int, code: str, attempts: int
) -> None:
    workflow = greeting(builder)
    with pytest.raises(ActivityError) as raised:
        executed(workflow, user)
    assert raised.value.code == code
    assert calls["lookup"] == attempts  # the step is not tried again for an activity that was
    assert not any(name.startswith("track") for name in calls)


class Unknown(Activity):
    NAME = "unknown"


def calls_unknown(cx: StepContext, n: int) -> To:
    calls["calls_unknown"] += 1
    cx.call(Unknown, "key", n)
    return To.done()


def same_key(cx: StepContext, n: int) -> To:
    cx.emit(Track, "key", "a")
    cx.emit(Track, "key", "b")
    return To.done()


def test_an_unregistered_activity_is_named_when_it_is_called(builder: WorkflowBuilder) -> None:
    workflow = builder.activity(Track).step(calls_unknown).name("unregistered").build()
    with pytest.raises(StepMisused, match=r"'unknown' is not registered with workflow 'unregistered'.*'track'"):
        executed(workflow, 1)
    assert calls["calls_unknown"] == 1


def test_a_key_names_one_call_of_a_step(builder: WorkflowBuilder) -> None:
    with pytest.raises(StepMisused, match="'key' names two calls"):
        executed(builder.activity(Track).step(same_key).name("keys").build(), 1)


def emit_then_call(cx: StepContext, n: int) -> To:
    cx.emit(Track, "before", str(n))
    first = cx.call(Lookup, "first", n)
    cx.emit(Track, "between", first)
    second = cx.call(Lookup, "second", n + 1)
    return To.done([first, second])


def test_emits_before_and_between_calls_lose_no_wake_up(builder: WorkflowBuilder) -> None:
    workflow = builder.activity(Lookup("e.org")).activity(Track).step(emit_then_call).name("many").build()
    runs = [workflow.enqueue(n) for n in range(10, 60)]
    handle = workflow.runtime(concurrency=8).start()
    try:
        for n, run in zip(range(10, 60), runs, strict=True):
            assert run.get(timeout=90) == [f"{n}@e.org", f"{n + 1}@e.org"]
        for run in runs:
            wait_for(lambda run=run: run.status in TERMINAL, 60, "what was emitted to be done")  # type: ignore[misc]
    finally:
        handle.shutdown()
    assert calls["lookup"] == 2 * len(runs)
    assert sum(count for name, count in calls.items() if name.startswith("track")) == 2 * len(runs)


def changes_its_mind(cx: StepContext, n: int) -> To:
    calls["changes"] += 1
    cx.call(Lookup, "lookup", n + calls["changes"])
    raise TaskError.retryable("executed again also where the answer came before the suspension")


def test_a_step_that_makes_another_call_when_it_is_executed_again_is_told(builder: WorkflowBuilder) -> None:
    workflow = builder.activity(Lookup("e.org")).step(changes_its_mind).name("mind").build()
    with pytest.raises(StepMisused, match="must make the same calls"):
        executed(workflow, 10)


def test_a_delayed_run_is_not_executed_before(builder: WorkflowBuilder) -> None:
    workflow = builder.step(last).name("delayed").build()
    run = workflow.enqueue(1, delay=1.0)
    handle = workflow.runtime().start()
    try:
        assert run.get(timeout=60) == 1
    finally:
        handle.shutdown()
    [step] = run.steps()
    assert step.started_at
    assert step.created_at
    assert (step.started_at - step.created_at).total_seconds() >= 1.0


def fragile(cx: StepContext, n: int) -> To:
    calls["fragile"] += 1
    cx.emit(Track, "track", f"attempt {calls['fragile']}")
    if calls["fragile"] < n:
        raise TaskError.retryable("again")
    if n == 0:
        raise TaskError.fatal("never")
    return To.done(calls["fragile"])


def test_a_step_is_tried_again_and_emits_only_when_it_succeeds(builder: WorkflowBuilder) -> None:
    workflow = builder.activity(Track).step(fragile).name("fragile").build()
    run = workflow.enqueue(3)
    handle = workflow.runtime().start()
    try:
        assert run.get(timeout=60) == 3
        wait_for(lambda: run.status in TERMINAL, 60, "the run to end")
    finally:
        handle.shutdown()
    assert [name for name in calls if name.startswith("track")] == ["track attempt 3"]


def test_a_fatal_error_of_a_step_is_not_tried_again(builder: WorkflowBuilder) -> None:
    with pytest.raises(TaskError, match="never"):
        executed(builder.activity(Track).step(fragile).name("fatal").build(), 0)
    assert calls == {"fragile": 1}


def heals(cx: StepContext, n: int) -> To:
    calls["heals"] += 1
    if not gate.is_set():
        raise ValueError("not yet")
    return To.done(n)


def test_an_exhausted_step_fails_the_run_and_resume_goes_on_from_there(builder: WorkflowBuilder) -> None:
    workflow = builder.step(later).step(heals).name("resumed").build()
    run = workflow.enqueue(1)
    handle = workflow.runtime().start()
    try:
        with pytest.raises(ValueError, match="not yet"):
            run.get(timeout=60)
        assert calls["heals"] == QUICK.max_attempts
        gate.set()
        run.resume()
        assert run.get(timeout=60) == 2
    finally:
        handle.shutdown()
    assert steps_of(run)["later"] == "SUCCESS"


def slow(cx: StepContext, n: int) -> To:
    calls["slow"] += 1
    gate.wait(30)
    return To.done(n)


def test_shutdown_finishes_what_is_executed_and_leaves_the_rest_in_the_ledger(builder: WorkflowBuilder) -> None:
    workflow = builder.step(slow).name("slow").build()
    runs = [workflow.enqueue(n) for n in range(3)]
    handle = workflow.runtime(concurrency=1, prefetch_multiplier=1).start()
    with pytest.raises(RunStateError, match="already"):
        workflow.runtime().start()
    wait_for(lambda: calls["slow"], 60, "a step to begin")
    handle.request_shutdown()
    gate.set()
    assert handle.wait(60)
    first = [run for run in runs if run.status in TERMINAL]
    assert 1 <= len(first) == calls["slow"] < 3 or len(first) == 3
    second = workflow.runtime().start()
    try:
        assert [run.get(timeout=60) for run in runs] == [0, 1, 2]
    finally:
        second.shutdown()


def test_a_program_with_a_runtime_may_wait_for_its_results(builder: WorkflowBuilder, pgqrs: Pgqrs) -> None:
    def double(n: int) -> int:
        return 2 * n

    task = pgqrs.app.task(name="double", shared=False)(double)
    handle = builder.step(last).name("beside").build().runtime().start()
    try:
        assert task.delay(21).get(timeout=60) == 42
    finally:
        handle.shutdown()


def test_a_run_enqueued_in_a_transaction_exists_if_that_commits(builder: WorkflowBuilder, database_dsn: str) -> None:
    workflow = builder.step(last).name("transactional").build()
    with psycopg.connect(database_dsn) as connection:
        workflow.enqueue_using(connection, 1)
        connection.rollback()
        with pytest.raises(InvalidInput):
            workflow.enqueue_using(connection, "one")
        kept = workflow.enqueue_using(connection, 2)
    handle = workflow.runtime().start()
    try:
        assert kept.get(timeout=60) == 2
    finally:
        handle.shutdown()
    assert calls["last"] == 1


def test_eager_mode_is_refused_because_nobody_would_go_on_with_a_suspended_step(
    builder: WorkflowBuilder, pgqrs: Pgqrs
) -> None:
    workflow = builder.step(last).name("eager").build()
    pgqrs.app.conf.task_always_eager = True
    with pytest.raises(NotDurable, match="task_always_eager"):
        workflow.enqueue(1)
    assert not calls


def test_the_same_key_is_the_same_run(builder: WorkflowBuilder) -> None:
    workflow = builder.step(last).name("keyed").build()
    assert workflow.enqueue(1, workflow_key="k") == workflow.enqueue(1, workflow_key="k")


def test_what_is_built_wrongly_is_refused_by_name(pgqrs: Pgqrs, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Celery("plain", set_as_current=False)
    monkeypatch.setattr(underway_builder, "current_app", plain)

    def no_input(cx: StepContext) -> To:
        return To.done()

    with pytest.raises(ConfigurationError, match="needs a name"):
        Workflow.builder().app(pgqrs).step(last).build()
    with pytest.raises(ConfigurationError, match="has no step"):
        Workflow.builder().app(pgqrs).name("empty").build()
    with pytest.raises(ConfigurationError, match=r"'no_input'.*must take the context and its input"):
        Workflow.builder().app(pgqrs).step(no_input).name("a").build()
    with pytest.raises(ConfigurationError, match="'track' is registered twice"):
        Workflow.builder().activity(Track).activity(Track)
    with pytest.raises(ConfigurationError, match="where it is executed"):
        Workflow.builder().step(last).name("nowhere").build()
    with pytest.raises(ConfigurationError, match="Pgqrs"):
        Workflow.builder().app(plain)
    Workflow.builder().app(pgqrs).step(last).name("twice").build()
    with pytest.raises(ConfigurationError, match="built before"):
        Workflow.builder().app(pgqrs).step(last).name("twice").build()
    monkeypatch.setattr(underway_builder, "current_app", pgqrs.app)
    assert Workflow.builder().step(last).name("current").build().pgqrs is pgqrs


#: Executes steps until it is killed; the first execution of the activity waits for that.
WORKER = """
import sys, threading
from pathlib import Path
from pgqrs_celery.compat.underway import Activity, To, Workflow, run_migrations

class Charge(Activity):
    NAME = "charge"
    Input = int
    Output = str

    def execute(self, amount: int) -> str:
        print("charging", flush=True)
        if sys.argv[3] == "hang":
            threading.Event().wait()
        return f"charged {amount}"

def begin(cx, amount: int) -> To:
    print("begin", flush=True)
    return To.next(amount + 1)

def pay(cx, amount: int) -> To:
    return To.done(cx.call(Charge, "charge", amount))

workflow = Workflow.builder().activity(Charge).step(begin).step(pay).name("payment")
workflow = workflow.pool(sys.argv[1], schema=sys.argv[2]).build()
if sys.argv[3] == "hang":
    run_migrations(sys.argv[1], schema=sys.argv[2])
    print(workflow.enqueue(41).id, flush=True)
handle = workflow.runtime(concurrency=2).start()
if sys.argv[3] != "hang":
    print(workflow.run(int(sys.argv[4])).get(timeout=80), flush=True)
    handle.shutdown()
handle.wait()
"""


def test_a_worker_killed_in_an_activity_is_followed_by_one_that_executes_only_that(
    database_dsn: str, installed_schema: str, program: Program
) -> None:
    victim = program(WORKER, database_dsn, installed_schema, "hang")
    assert victim.stdout is not None
    run = victim.stdout.readline().strip()
    assert [victim.stdout.readline().strip() for _ in range(2)] == ["begin", "charging"], victim.stderr
    victim.kill()
    victim.wait()
    rescuer = program(WORKER, database_dsn, installed_schema, "finish", run)
    stdout, stderr = rescuer.communicate(timeout=240)
    assert rescuer.returncode == 0, stderr
    assert stdout.splitlines() == ["charging", "charged 42"]
