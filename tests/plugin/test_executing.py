"""What a worker makes of durable tasks: a worker in a thread of this process, on Redis, with both kinds of backend."""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject, TaskRevokedError

from pgqrs_celery import DurableTask
from pgqrs_celery.exceptions import NotDurable, ResultNotSerializable, ResultTooLarge, RunCancelled
from tests.support.bench import TIMEOUT, Bench
from tests.support.waiting import wait_for

# --- the ordinary course


def test_a_chain_leaves_a_row_for_every_link_and_ends_its_run(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.add.s(2), bench.add.s(3)).delay()
    assert result.get(TIMEOUT) == 6
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert [(step.status, step.output, step.attempt, step.open) for step in run.steps()] == [
        ("SUCCESS", "1", 1, False),
        ("SUCCESS", "3", 1, False),
        ("SUCCESS", "6", 1, False),
    ]
    assert run.get(TIMEOUT) == 6
    assert bench.journal == Counter(["add 1 0", "add 1 2", "add 3 3"])


def test_two_tasks_of_one_name_in_a_chain_keep_their_own_results(bench: Bench) -> None:
    result = chain(bench.echo.s("x"), bench.echo.si("y"), bench.echo.si("z")).delay()
    assert result.get(TIMEOUT) == "z"
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert sorted(json.loads(step.output or "") for step in run.steps()) == ["x", "y", "z"]
    assert len({step.step_id for step in run.steps()}) == 3


def test_an_immutable_link_gets_nothing_of_its_predecessor(bench: Bench) -> None:
    assert chain(bench.add.s(1, 2), bench.add.si(5, 6)).delay().get(TIMEOUT) == 11


@pytest.mark.parametrize(
    "value", [None, 2**70, 1e16, [1, [2]], {"content_type": "x"}, "a\x00b", "☃", math.inf], ids=repr
)
def test_the_first_run_already_sees_the_value_a_replay_would_see(bench: Bench, value: Any) -> None:
    result = chain(bench.echo.s(value), bench.echo.s()).delay()
    assert result.get(TIMEOUT) == value
    run = bench.run_of(result)
    bench.ended(run)
    assert {repr(bench.shop.pgqrs.ledger.values.load(step.output)) for step in run.steps()} == {repr(value)}


def test_a_group_is_one_run_that_ends_with_its_last_member(bench: Bench) -> None:
    result = group(bench.add.s(n, n) for n in range(4)).apply_async()
    assert result.get(TIMEOUT) == [0, 2, 4, 6]
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert len(run.steps()) == 4


def test_a_chain_that_fans_out_is_one_run(bench: Bench) -> None:
    result = chain(bench.add.s(1), group(bench.add.s(10), bench.add.s(20), bench.add.s(30))).delay()
    assert sorted(result.get(TIMEOUT)) == [11, 21, 31]
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert len(run.steps()) == 4


def test_nested_groups_are_one_run(bench: Bench) -> None:
    result = group(group(bench.add.s(1), bench.add.s(2)), bench.add.s(3) | bench.add.s(4)).apply_async()
    assert result.get(TIMEOUT) == [1, 2, 7]
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert len(run.steps()) == 4


def test_a_long_chain_runs_to_its_end(bench: Bench) -> None:
    length = 45
    result = chain(bench.add.s(0), *(bench.add.s(1) for _ in range(length))).delay()
    assert result.get(TIMEOUT) == length
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert len(run.steps()) == length + 1


def test_a_task_sent_by_name_is_durable(bench: Bench) -> None:
    result = bench.shop.app.send_task("shop.add", (1, 2), link=bench.note_task.si("linked"))
    assert result.get(TIMEOUT) == 3
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert bench.rows(run) == {"add": "SUCCESS", "note": "SUCCESS"}


def test_pickled_arguments_reach_a_durable_task(bench: Bench) -> None:
    assert bench.total.apply_async(({1, 2, 3},), serializer="pickle").get(TIMEOUT) == 6


def test_started_is_stored_when_the_step_is_acquired(bench: Bench) -> None:
    seen = []

    @bench.task(bind=True, name="shop.looks", track_started=True)
    def looks(self: Any) -> None:
        seen.append(self.AsyncResult(self.request.id).state)

    looks.delay().get(TIMEOUT)
    assert seen == ["STARTED"]


def test_a_backend_that_does_not_take_started_fails_no_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, refused = type(bench.shop.app.backend), []
    store_result = backend.store_result

    def store(self: Any, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        if state == "STARTED":
            refused.append(task_id)
            raise ConnectionError("not now")
        return store_result(self, task_id, result, state, *args, **kwargs)

    monkeypatch.setattr(backend, "store_result", store)

    @bench.task(name="shop.looked_at", track_started=True)
    def looked_at() -> int:
        return 1

    result = looked_at.delay()
    assert result.get(TIMEOUT) == 1
    assert refused == [result.id]


def test_a_body_calls_itself_as_an_ordinary_function(bench: Bench) -> None:
    @bench.task(name="shop.factorial")
    def factorial(n: int) -> int:
        return 1 if n == 0 else n * int(factorial(n - 1)) + bench.add(0, 0)

    assert factorial.delay(5).get(TIMEOUT) == 120


def test_a_task_may_have_a_base_of_its_own(bench: Bench) -> None:
    class Noting(DurableTask):
        abstract = True

        def on_success(self, retval: Any, *args: Any, **kwargs: Any) -> None:
            bench.note(f"on_success {retval}")

        def on_failure(self, exc: Exception, *args: Any, **kwargs: Any) -> None:
            bench.note(f"on_failure {exc}")

        def after_return(self, status: str, *args: Any, **kwargs: Any) -> None:
            bench.note(f"after_return {status}")

    @bench.task(name="shop.good", base=Noting)
    def good() -> int:
        return 1

    @bench.task(name="shop.bad", base=Noting)
    def bad() -> float:
        return 1 / 0

    assert good.delay().get(TIMEOUT) == 1
    with pytest.raises(ZeroDivisionError):
        bad.delay().get(TIMEOUT)
    wait_for(lambda: bench.journal["after_return FAILURE"], TIMEOUT)
    assert bench.journal == Counter(
        ["on_success 1", "after_return SUCCESS", "on_failure division by zero", "after_return FAILURE"]
    )


def test_an_ignored_result_is_not_stored_but_its_step_is(bench: Bench) -> None:
    result = chain(bench.add.s(1).set(ignore_result=True), bench.note_task.si("after")).delay()
    assert result.get(TIMEOUT) == "noted"
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert [step.output for step in run.steps()] == ["1", '"noted"']
    assert result.parent.state == "PENDING"


# --- duplicates


def test_a_message_that_comes_again_while_its_step_is_done_does_nothing(bench: Bench) -> None:
    result = bench.add.delay(4, 5)
    assert result.get(TIMEOUT) == 9
    bench.ended(bench.run_of(result))
    step = bench.shop.step(result.id)
    publish_copy(bench, result.id, generation=0)
    marker = bench.note_task.delay("behind the copy")
    marker.get(TIMEOUT)
    assert bench.journal["add 4 5"] == 1
    assert bench.shop.step(result.id) == step


def publish_copy(bench: Bench, task_id: str, generation: int) -> None:
    """Send a message of this task past the ledger, as a broker may deliver one again."""
    amqp = bench.shop.app.amqp
    message = amqp.as_task_v2(task_id, "shop.add", (4, 5), {}, retries=generation)
    message.headers.update({"pgqrs": 1, "pgqrs-sent": "2030-01-01T00:00:00+00:00"})
    with bench.shop.app.connection_for_write() as connection:
        producer = connection.Producer()
        producer.publish(
            message.body, headers=message.headers, routing_key="celery", serializer="json", **message.properties
        )


def test_a_message_of_a_task_that_retention_removed_does_nothing(bench: Bench) -> None:
    publish_copy(bench, str(uuid.uuid4()), generation=0)
    bench.note_task.delay("behind the copy").get(TIMEOUT)
    assert bench.journal["add 4 5"] == 0


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_message_sent_without_this_package_is_adopted(bench: Bench, protocol: int) -> None:
    task_id, amqp = str(uuid.uuid4()), bench.shop.app.amqp
    make = amqp.as_task_v1 if protocol == 1 else amqp.as_task_v2
    callback = bench.note_task.si("adopted")
    message = make(task_id, "shop.add", (4, 5), {}, callbacks=[dict(callback)])
    with bench.shop.app.connection_for_write() as connection:
        connection.Producer().publish(
            message.body, headers=message.headers, routing_key="celery", serializer="json", **message.properties
        )
    assert bench.shop.app.AsyncResult(task_id).get(TIMEOUT) == 9
    run = bench.run_of(task_id)
    assert bench.ended(run) == "SUCCESS"
    assert bench.rows(run) == {"add": "SUCCESS", "note": "SUCCESS"}


# --- failures


def test_a_failure_is_stored_once_with_its_consequences(bench: Bench) -> None:
    errback, plain = bench.note_task.si("errback"), bench.plain_errback.s()
    result = chain(bench.fails.s(), bench.add.s(1)).apply_async(link_error=[errback, plain])
    with pytest.raises(ValueError, match="no such luck"):
        result.get(TIMEOUT)
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    wait_for(lambda: bench.journal["note errback"] and bench.journal["plain errback ValueError"], TIMEOUT)
    assert bench.rows(run) == {"fails": "FAILED", "note": "SUCCESS"}
    with pytest.raises(ValueError, match="no such luck"):
        run.get(TIMEOUT)
    assert bench.journal == Counter(["fails", "note errback", "plain errback ValueError"])
    recorded = json.loads(run.record.error or "")
    assert recorded["step_id"].startswith("fails#")
    assert recorded["error"]["exc_type"] == "ValueError"
    assert "no such luck" in recorded["error"]["traceback"]


def test_a_result_that_cannot_be_written_names_step_and_type_and_can_be_resumed(bench: Bench) -> None:
    @bench.task(name="shop.odd")
    def odd() -> Any:
        return object() if "odd" in bench.broken else 5

    bench.broken.add("odd")
    result = chain(odd.s(), bench.add.s(1)).delay()
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    with pytest.raises(ResultNotSerializable, match=r"step 'odd#\w+' returned a builtins\.object"):
        run.get(TIMEOUT)
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == 6
    assert result.get(TIMEOUT) == 6


def test_a_result_that_is_too_large_names_the_setting_and_can_be_resumed(bench: Bench) -> None:
    @bench.task(name="shop.large")
    def large() -> str:
        return "x" * (20_000 if "large" in bench.broken else 10)

    bench.broken.add("large")
    run = bench.run_of(large.delay())
    assert bench.ended(run) == "FAILED"
    with pytest.raises(ResultTooLarge, match="pgqrs_max_result_bytes = 10000"):
        run.get(TIMEOUT)
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == "x" * 10


def test_a_hand_off_that_cannot_work_fails_the_run_but_not_the_step(bench: Bench) -> None:
    @bench.task(name="shop.ship")
    def ship() -> None:
        """Take no argument."""

    result = chain(bench.add.s(1, 2), ship.s()).apply_async(link_error=bench.note_task.si("errback"))
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    assert bench.rows(run)["add"] == "SUCCESS"
    with pytest.raises(TypeError):
        run.get(TIMEOUT)
    with pytest.raises(TypeError):
        result.get(TIMEOUT)
    assert result.parent.get(TIMEOUT) == 3
    wait_for(lambda: bench.journal["note errback"], TIMEOUT)
    assert bench.journal["add 1 2"] == 1


# --- retries


def test_a_retry_is_the_same_step_with_one_attempt_more(bench: Bench) -> None:
    @bench.task(bind=True, name="shop.flaky", max_retries=5)
    def flaky(self: Any, value: int) -> int:
        bench.note(f"flaky {self.request.retries}")
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return value + int(self.request.retries)

    result = chain(flaky.s(10), bench.add.s(100)).delay()
    assert result.get(TIMEOUT) == 112
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert [(step.attempt, step.lost) for step in run.steps()] == [(3, 0), (1, 0)]
    assert bench.journal == Counter(["flaky 0", "flaky 1", "flaky 2", "add 12 100"])


def test_a_retry_with_a_countdown_waits_in_the_ledger(bench: Bench) -> None:
    @bench.task(bind=True, name="shop.later")
    def later(self: Any) -> str:
        bench.note(f"later {self.request.retries}")
        if not self.request.retries:
            raise self.retry(countdown=1000)
        return "done"

    result = later.delay()
    wait_for(lambda: bench.shop.step(result.id).generation, TIMEOUT)
    step = bench.shop.step(result.id)
    assert (step.status, step.sent, step.attempt) == ("QUEUED", False, 1)
    assert step.due == pytest.approx(1000, abs=30)
    wait_for(lambda: result.state == "RETRY", TIMEOUT)
    bench.add.delay(1).get(TIMEOUT)  # the worker's only slot is free
    bench.shop.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET due_at = {schema}.pgqrs_now() WHERE task_id = %s", [result.id]
    )
    assert result.get(TIMEOUT) == "done"
    assert bench.journal["later 1"] == 1


def test_autoretry_gives_up_after_the_last_try(bench: Bench) -> None:
    @bench.task(name="shop.hopeless", autoretry_for=(ValueError,), max_retries=2, default_retry_delay=0)
    def hopeless() -> None:
        bench.note("hopeless")
        raise ValueError("again")

    result = hopeless.apply_async(link_error=bench.note_task.si("errback"))
    with pytest.raises(ValueError, match="again"):
        result.get(TIMEOUT)
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    wait_for(lambda: bench.journal["note errback"], TIMEOUT)
    assert bench.journal == Counter({"hopeless": 3, "note errback": 1})


# --- Reject and Ignore


def test_a_body_that_asks_to_be_ignored_cancels_its_step(bench: Bench) -> None:
    @bench.task(name="shop.ignores")
    def ignores() -> None:
        raise Ignore

    run = bench.run_of(chain(ignores.s(), bench.add.s(1)).delay())
    assert bench.ended(run) == "CANCELLED"
    assert bench.rows(run) == {"ignores": "CANCELLED"}


def test_a_body_that_rejects_its_message_for_good_fails_its_step(bench: Bench) -> None:
    @bench.task(name="shop.rejects")
    def rejects() -> None:
        raise Reject("no, thanks", requeue=False)

    result = rejects.delay()
    run = bench.run_of(result)
    assert bench.ended(run) == "FAILED"
    assert "no, thanks" in str(run.record.error)


def test_a_body_that_gives_its_message_back_is_executed_again(bench: Bench) -> None:
    @bench.task(name="shop.later_please")
    def later_please() -> str:
        bench.note("asked")
        if bench.journal["asked"] < 3:
            raise Reject("later", requeue=True)
        return "now"

    result = later_please.delay()
    assert result.get(TIMEOUT) == "now"
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert [(step.attempt, step.lost) for step in run.steps()] == [(3, 0)]


# --- callbacks, children, replacements


def test_callbacks_are_steps_of_the_run_and_called_once(bench: Bench) -> None:
    result = bench.add.apply_async(
        (1, 2), link=[bench.note_task.s(), bench.plain.s(), bench.add.s(10) | bench.echo.s()]
    )
    assert result.get(TIMEOUT) == 3
    run = bench.run_of(result)
    wait_for(lambda: bench.journal["echo 13"] and bench.journal["plain 3"], TIMEOUT)
    assert bench.ended(run) == "SUCCESS"
    assert bench.rows(run) == {"add": "SUCCESS", "note": "SUCCESS", "echo": "SUCCESS"}
    assert bench.journal == Counter(["add 1 2", "note 3", "plain 3", "add 3 10", "echo 13"])


def test_what_a_body_sends_belongs_to_its_run(bench: Bench) -> None:
    @bench.task(name="shop.parent")
    def parent() -> list[str]:
        return [bench.add.delay(n % 2).id for n in range(4)] + [bench.plain.delay(7).id]

    result = parent.delay()
    children = result.get(TIMEOUT)
    assert len(set(children)) == 5
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert len(run.steps()) == 5
    wait_for(lambda: bench.journal["plain 7"], TIMEOUT)


def test_a_body_that_fails_after_sending_sends_the_same_again_when_it_is_resumed_and_that_runs_once(
    bench: Bench,
) -> None:
    @bench.task(name="shop.careless")
    def careless() -> str:
        bench.add.delay(7, 7)
        group(bench.echo.s("a"), bench.echo.s("a")).apply_async()
        if "careless" in bench.broken:
            raise ValueError("too early")
        return "done"

    bench.broken.add("careless")
    run = bench.run_of(careless.delay())
    assert bench.ended(run) == "FAILED"
    bench.broken.clear()
    assert run.resume().get(TIMEOUT) == "done"
    assert bench.journal == Counter({"add 7 7": 1, "echo a": 2})
    assert len(run.steps()) == 4


@pytest.mark.parametrize("by", ["task", "chain", "group in a chain", "task that is replaced"])
def test_a_replaced_task_ends_with_what_replaces_it(bench: Bench, by: str) -> None:
    @bench.task(bind=True, name="shop.replaced")
    def replaced(self: Any, kind: str) -> Any:
        bench.note(f"replaced {kind}")
        if kind == "task that is replaced":
            raise self.replace(replaced.s("task"))
        raise self.replace(
            {
                "task": lambda: bench.add.s(1, 2),
                "chain": lambda: bench.add.s(1) | bench.add.s(1) | bench.add.s(1),
                "group in a chain": lambda: bench.add.s(1) | bench.add.s(2),
            }[kind]()
        )

    result = chain(replaced.s(by), bench.add.s(10)).delay()
    assert result.get(TIMEOUT) == 13
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert set(bench.rows(run).values()) == {"SUCCESS"}


def test_map_starmap_and_chunks_return_what_they_do(bench: Bench) -> None:
    assert bench.add.map([1, 2]).delay().get(TIMEOUT) == [1, 2]
    assert bench.add.starmap([(1, 2), (3, 4)]).delay().get(TIMEOUT) == [3, 7]
    result = bench.add.chunks([(n, n) for n in range(6)], 3).apply_async()
    assert result.get(TIMEOUT) == [[0, 2, 4], [6, 8, 10]]
    assert bench.ended(bench.run_of(result)) == "SUCCESS"


# --- plain tasks between durable ones


def test_a_run_stays_open_while_a_plain_link_is_under_way(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.plain.s(), bench.add.s(2), bench.plain.s(), bench.add.s(3)).delay()
    assert result.get(TIMEOUT) == 6
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert [step.status for step in run.steps()] == ["SUCCESS"] * 3
    assert bench.journal["plain 1"] == bench.journal["plain 3"] == 1


def test_a_plain_link_at_the_end_does_not_keep_its_run_open(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.plain.s()).delay()
    assert result.get(TIMEOUT) == 1
    assert bench.ended(bench.run_of(result)) == "SUCCESS"


def test_a_cancelled_run_that_awaited_a_link_comes_to_rest(bench: Bench) -> None:
    result = chain(bench.add.s(1), bench.plain.s().set(queue="nobody-listens"), bench.add.s(2)).delay()
    run = bench.run_of(result)
    wait_for(lambda: len(run.steps()) == 2, TIMEOUT)
    run.cancel()
    wait_for(lambda: not [step for step in run.steps() if step.open], TIMEOUT, "the awaited step to come to rest")
    assert sorted(step.status for step in run.steps()) == ["CANCELLED", "SUCCESS"]
    assert result.state == "REVOKED"


# --- revocation


def test_a_message_that_expired_cancels_its_step(bench: Bench) -> None:
    result = chain(bench.add.s(1).set(expires=-1), bench.add.s(2)).delay()
    run = bench.run_of(result)
    assert bench.ended(run) == "CANCELLED"
    with pytest.raises(TaskRevokedError):
        result.parent.get(TIMEOUT)
    with pytest.raises(RunCancelled):
        run.get(TIMEOUT)
    assert bench.journal == Counter()


# --- chords


def test_a_chord_needs_the_ledger_s_own_backend(bench: Bench) -> None:
    if bench.shop.app.conf.result_backend.startswith("redis"):
        with pytest.raises(NotDurable):
            chord([bench.add.s(1), bench.add.s(2)], bench.total.s()).delay()
        return
    result = chord([bench.add.s(1), bench.add.s(2)], bench.total.s()).delay()
    assert result.get(TIMEOUT) == 3
    run = bench.run_of(result)
    assert bench.ended(run) == "SUCCESS"
    assert bench.rows(run) == {"add": "SUCCESS", "total": "SUCCESS"}
