"""The guides' API for triggered runs: definitions, consumers, results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pgqrs_celery import ConfigurationError, PoisonedStep, WorkflowNotDefined
from pgqrs_celery.compat import pgqrs
from pgqrs_celery.compat.pgqrs import Message, PyWorkflow, Store
from pgqrs_celery.decorators import step, workflow
from pgqrs_celery.exceptions import LeaseLost
from tests.compat.conftest import Program

#: Takes a run, records a step, says so and then does nothing.
VICTIM = """
import asyncio, sys
import pgqrs_celery

async def main():
    store = await pgqrs_celery.connect(sys.argv[1], sys.argv[2])
    consumer = await pgqrs_celery.consumer("victim", 1, "job").create(store, lease=2.0)
    [message] = await consumer.dequeue(timeout=30)
    run = await pgqrs_celery.run().message(message).store(store).execute()
    first = await run.acquire_step("first")
    await first.guard.success("by the victim")
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def scenario(test: Callable[[Store], Awaitable[None]]) -> Callable[[Store], None]:
    """Run a coroutine as a test."""

    def run(store: Store) -> None:
        asyncio.run(test(store))  # type: ignore[arg-type]

    run.__name__ = run.__qualname__ = test.__name__
    return run


async def triggered(store: Store, params: object = None) -> int:
    await store.create_workflow("job")
    return await pgqrs.workflow("job").trigger(params).execute(store)


async def execute(store: Store, message: Message) -> PyWorkflow:
    return await pgqrs.run().message(message).store(store).execute()


@scenario
async def test_a_workflow_is_defined_once_before_it_is_triggered(store: Store) -> None:
    with pytest.raises(WorkflowNotDefined, match="create_workflow"):
        await pgqrs.workflow("job").trigger(1).execute(store)
    assert await store.create_workflow("job") is True
    assert await store.create_workflow("job") is False
    run_id = await pgqrs.workflow().name("job").trigger({"n": 1}).execute(store)
    found = await pgqrs.workflow("job").get_run(run_id, store)
    assert (found.status, found.output) == ("QUEUED", None)
    assert await pgqrs.run().message(run_id).store(store).get() is None
    with pytest.raises(ConfigurationError, match="'job'"):
        await pgqrs.workflow("other").get_run(run_id, store)


@scenario
async def test_each_run_goes_to_one_consumer_in_the_order_they_were_triggered(store: Store) -> None:
    ids = [await triggered(store, n) for n in range(6)]
    one = await pgqrs.consumer("one", 1, "job").create(store)
    two = await pgqrs.consumer("two", 2, "job").create(store)
    first, second = await asyncio.gather(one.dequeue(batch_size=3), two.dequeue(batch_size=3))
    assert sorted([*(m.id for m in first), *(m.id for m in second)]) == ids
    assert sorted([*(m.payload for m in first), *(m.payload for m in second)]) == list(range(6))
    assert await one.dequeue(timeout=0) == []
    other = await pgqrs.consumer("other", 3, "another queue").create(store)
    assert await other.dequeue(timeout=0) == []


@scenario
async def test_a_decorated_function_executes_what_was_dequeued_and_result_waits_for_it(store: Store) -> None:
    @step
    async def square(ctx: PyWorkflow, n: int) -> int:
        return n * n

    @workflow(name="job")
    async def job(ctx: PyWorkflow, n: int) -> int:
        result: int = await square(ctx, n)
        return result

    run_id = await triggered(store, 12)
    waiting = asyncio.create_task(pgqrs.run().message(run_id).store(store).result(timeout=60))
    consumer = await pgqrs.consumer("one", 1, "job").create(store)
    [message] = await consumer.dequeue()
    assert await job(await execute(store, message), message.payload) == 144
    assert await consumer.archive(message.id) is True
    assert await consumer.archive(message.id) is False
    assert await waiting == 144


@scenario
async def test_the_error_of_a_run_reaches_whoever_waits_for_its_result(store: Store) -> None:
    run_id = await triggered(store)
    consumer = await pgqrs.consumer("one", 1, "job").create(store)
    [message] = await consumer.dequeue()
    run = await execute(store, message)
    await run.fail(ValueError("no such thing"))
    for answer in (pgqrs.run().message(run_id).store(store).result(), pgqrs.run().message(run_id).store(store).get()):
        with pytest.raises(ValueError, match="no such thing"):
            await answer
    assert await consumer.dequeue(timeout=0) == []


@scenario
async def test_what_is_released_or_left_by_a_closed_consumer_is_delivered_again(store: Store) -> None:
    await triggered(store)
    one = await pgqrs.consumer("one", 1, "job").create(store)
    [message] = await one.dequeue()
    assert await one.release(message.id) is True
    [again] = await one.dequeue()
    assert (again.id, again.attempt) == (message.id, 1)  # giving back is no attempt
    await one.close()
    two = await pgqrs.consumer("two", 2, "job").create(store)
    assert [m.id for m in await two.dequeue()] == [message.id]


@scenario
async def test_a_lease_is_renewed_as_long_as_its_consumer_lives(store: Store) -> None:
    await triggered(store)
    one = await pgqrs.consumer("one", 1, "job").create(store, lease=3.0)
    [message] = await one.dequeue()
    two = await pgqrs.consumer("two", 2, "job").create(store)
    assert await two.dequeue(timeout=7.0) == []
    run = await execute(store, message)
    await run.complete("done")
    assert (await store.get_run(message.id)).value() == "done"


@scenario
async def test_a_consumer_that_stalled_past_its_lease_cannot_write_any_more(store: Store) -> None:
    await triggered(store)
    stalled = await pgqrs.consumer("stalled", 1, "job").create(store, lease=60)
    [message] = await stalled.dequeue()
    old = await execute(store, message)
    mine = await old.acquire_step("step")
    await store.call(
        lambda session: session.connection.execute(
            f"UPDATE {store.ledger.database.schema}.pgqrs_workflow_steps SET due_at = now() WHERE kind = 'function'"
        )
    )
    other = await pgqrs.consumer("other", 2, "job").create(store)
    [taken] = await other.dequeue(timeout=30)
    for late in (mine.guard.success("old"), mine.guard.fail("old"), old.complete("old")):
        with pytest.raises(LeaseLost):
            await late
    assert await stalled.archive(message.id) is False
    new = await execute(store, taken)
    assert (await new.acquire_step("step")).status == "EXECUTE"
    await new.complete("new")
    assert (await store.get_run(message.id)).value() == "new"


@scenario
async def test_a_run_that_kills_every_consumer_fails_in_the_end(store: Store) -> None:
    run_id = await triggered(store)
    schema = store.ledger.database.schema
    for _ in range(store.ledger.settings.max_lost):
        consumer = await pgqrs.consumer("doomed", 1, "job").create(store)
        assert [m.id for m in await consumer.dequeue()] == [run_id]
        await store.call(
            lambda session: session.connection.execute(
                f"UPDATE {schema}.pgqrs_workflow_steps SET due_at = now() WHERE kind = 'function'"
            )
        )
    consumer = await pgqrs.consumer("last", 1, "job").create(store)
    assert await consumer.dequeue(timeout=0) == []
    with pytest.raises(PoisonedStep):
        await pgqrs.run().message(run_id).store(store).result(timeout=10)


@scenario
async def test_a_polling_consumer_executes_what_comes_also_after_a_failure(store: Store) -> None:
    begun = asyncio.Event()

    @workflow(name="job")
    async def job(ctx: PyWorkflow, n: int) -> float:
        if n < 0:
            begun.set()
            await asyncio.Event().wait()
        return 1 / n

    ids = [await triggered(store, n) for n in (2, 0, 4)]
    consumer = await pgqrs.consumer("one", 1, "job").create(store)
    polling = asyncio.create_task(pgqrs.workflow().name(job).consumer(consumer).poll(store))
    assert await pgqrs.run().message(ids[0]).store(store).result(timeout=60) == 0.5
    with pytest.raises(ZeroDivisionError):
        await pgqrs.run().message(ids[1]).store(store).result(timeout=60)
    assert await pgqrs.run().message(ids[2]).store(store).result(timeout=60) == 0.25
    interrupted = await triggered(store, -1)
    await begun.wait()
    polling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await polling
    assert (await store.get_run(interrupted)).status == "RUNNING"  # the run has begun, its function waits again
    other = await pgqrs.consumer("two", 2, "job").create(store)
    assert [message.id for message in await other.dequeue(timeout=30)] == [interrupted]


@scenario
async def test_a_handler_may_be_a_plain_function(store: Store) -> None:
    def job(ctx: PyWorkflow, n: int) -> int:
        result: int = ctx.step("add", lambda: n + 1)
        return result

    run_id = await triggered(store, 1)
    poller = await pgqrs.consumer("one", 1, "job").handler(job).create(store)
    polling = asyncio.create_task(poller.poll())
    assert await pgqrs.run().message(run_id).store(store).result(timeout=60) == 2
    polling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await polling


def test_what_a_killed_consumer_had_goes_to_another_one_which_skips_what_was_done(
    store: Store, installed_schema: str, database_dsn: str, program: Program
) -> None:
    run_id = asyncio.run(triggered(store))
    victim = program(VICTIM, database_dsn, installed_schema)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    victim.kill()
    victim.wait()

    async def take_over() -> None:
        consumer = await pgqrs.consumer("rescuer", 2, "job").create(store)
        [message] = await consumer.dequeue(timeout=60)
        assert (message.id, message.attempt) == (run_id, 2)
        run = await execute(store, message)
        first = await run.acquire_step("first", current_time=run.current_time)
        assert (first.status, first.value) == ("SKIPPED", "by the victim")
        await run.complete("rescued")
        assert await consumer.archive(message.id)

    asyncio.run(take_over())
    assert store.run(run_id).value() == "rescued"
