"""The guides' API for runs that the calling process executes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

import pgqrs_celery
from pgqrs_celery import RunNotFound, StepMisused, StoreError, StoreUnavailable
from pgqrs_celery.cli.script import main
from pgqrs_celery.compat import pgqrs
from pgqrs_celery.compat.pgqrs import Admin, PyWorkflow, StepGuard, Store
from pgqrs_celery.decorators import step, workflow
from pgqrs_celery.exceptions import LeaseLost
from tests.compat.conftest import Program, output, psql

#: Executes, or goes on with, the run in its second argument; the step "slow" is where it is killed.
PIPELINE = """
import asyncio, sys
import pgqrs_celery
from pgqrs_celery import Admin, PyWorkflow
from pgqrs_celery.decorators import step, workflow

@step
async def fetch(ctx: PyWorkflow, city: str) -> dict:
    print("fetch", flush=True)
    return {"city": city, "degrees": [11, 12]}

@step
async def slow(ctx: PyWorkflow, weather: dict) -> float:
    print("slow", flush=True)
    if len(sys.argv) == 3:
        await asyncio.Event().wait()
    return sum(weather["degrees"]) / 2

@workflow
async def report(ctx: PyWorkflow, city: str) -> str:
    weather = await fetch(ctx, city)
    return f"{weather['city']}: {await slow(ctx, weather)}"

async def main():
    admin = Admin(sys.argv[1], sys.argv[2])
    if len(sys.argv) == 3:
        ctx = await admin.create_workflow("report", "Rome")
        print("run", ctx.id(), flush=True)
    else:
        ctx = await admin.get_workflow(int(sys.argv[3]))
    print(await report(ctx, "Rome"), flush=True)

asyncio.run(main())
"""


def test_a_process_killed_in_a_workflow_is_followed_by_one_that_skips_what_was_done(
    store: Store, installed_schema: str, database_dsn: str, program: Program
) -> None:
    first = program(PIPELINE, database_dsn, installed_schema)
    assert first.stdout is not None
    run = first.stdout.readline().split()[1]
    assert [first.stdout.readline().strip() for _ in range(2)] == ["fetch", "slow"]
    first.kill()
    first.wait()
    assert store.run(int(run)).status == "RUNNING"
    assert output(program(PIPELINE, database_dsn, installed_schema, run)).splitlines() == ["slow", "Rome: 11.5"]
    assert store.run(int(run)).output == "Rome: 11.5"
    # A run that has succeeded is not executed again.
    assert output(program(PIPELINE, database_dsn, installed_schema, run)).splitlines() == ["Rome: 11.5"]


def test_an_error_is_recorded_raised_as_it_was_and_forgotten_when_the_run_goes_on(store: Store) -> None:
    calls: list[str] = []

    @step
    async def sound(ctx: PyWorkflow, n: int) -> int:
        calls.append("sound")
        return n + 1

    @step
    async def fragile(ctx: PyWorkflow, n: int) -> int:
        calls.append("fragile")
        if calls.count("fragile") == 1:
            raise KeyError("lost")
        return n * 2

    @workflow
    async def both(ctx: PyWorkflow, n: int) -> int:
        result: int = await fragile(ctx, await sound(ctx, n))
        return result

    async def scenario() -> None:
        ctx = await pgqrs.admin(store).create_workflow("both", 1)
        with pytest.raises(KeyError, match="lost"):
            await both(ctx, 1)
        assert (await store.get_run(ctx.id())).status == "FAILED"
        assert isinstance((await store.get_run(ctx.id())).error, KeyError)
        assert await both(ctx, 1) == 4
        assert (await store.get_run(ctx.id())).value() == 4

    asyncio.run(scenario())
    assert calls == ["sound", "fragile", "fragile"]


def test_a_step_in_a_loop_returns_each_call_its_own_value_also_on_a_replay(store: Store) -> None:
    calls: list[int] = []

    @step
    async def double(ctx: PyWorkflow, n: int) -> int:
        calls.append(n)
        return 2 * n

    stop = [True]

    @workflow
    async def loop(ctx: PyWorkflow) -> list[int]:
        values = [await double(ctx, n) for n in (1, 2, 3)]
        if stop:
            raise RuntimeError(stop.pop())
        return values

    async def scenario() -> list[int]:
        ctx = await pgqrs.admin(store).create_workflow("loop")
        with pytest.raises(RuntimeError):
            await loop(ctx)
        values: list[int] = await loop(ctx)
        return values

    assert asyncio.run(scenario()) == [2, 4, 6]
    assert calls == [1, 2, 3]


def test_functions_may_be_plain_ones(store: Store) -> None:
    @step
    def half(ctx: PyWorkflow, n: int) -> float:
        return n / 2

    @workflow(name="plain")
    def plain(ctx: PyWorkflow, n: int) -> float:
        result: float = half(ctx, n)
        return result

    ctx = asyncio.run(pgqrs.admin(store).create_workflow("plain", 3))
    assert plain(ctx, 3) == 1.5
    assert store.run(ctx.id()).value() == 1.5


def test_guards_of_one_run_acquired_without_a_context_belong_together(store: Store) -> None:
    async def scenario() -> None:
        ctx = await Admin(store).create_workflow("guards")
        first = await StepGuard.acquire(store, ctx.id(), "first")
        second = await StepGuard.acquire(store, ctx.id(), "second")
        assert (first.status, second.status) == ("EXECUTE", "EXECUTE")
        assert await first.guard.success([1]) == [1]
        await second.guard.fail("no")
        del first, second
        assert [(s.status, s.value) for s in [await StepGuard.acquire(store, ctx.id(), "first")]] == [("SKIPPED", [1])]
        assert (await StepGuard.acquire(store, ctx.id(), "second")).status == "EXECUTE"

    asyncio.run(scenario())


def test_the_guard_of_an_execution_that_was_taken_over_changes_nothing(store: Store) -> None:
    async def scenario() -> None:
        admin = pgqrs.admin(store)
        old = await admin.create_workflow("zombie")
        mine = await old.acquire_step("step")
        new = await admin.get_workflow(old.id())
        theirs = await new.acquire_step("step")
        for late in (mine.guard.success("old"), mine.guard.fail("old"), old.complete("old")):
            with pytest.raises(LeaseLost):
                await late
        assert await theirs.guard.success("new") == "new"
        await new.complete("new")
        assert (await store.get_run(new.id())).value() == "new"

    asyncio.run(scenario())


def test_a_run_closes_together_with_its_function_or_not_at_all(store: Store) -> None:
    @workflow
    async def one(ctx: PyWorkflow) -> int:
        return 1

    def alter(change: str) -> None:
        table = f"{store.ledger.database.schema}.pgqrs_workflows"
        with store.ledger.database.session() as session:
            session.connection.execute(f"ALTER TABLE {table} {change}".encode())

    async def scenario() -> None:
        ctx = await pgqrs.admin(store).create_workflow("one")
        alter("ADD CONSTRAINT no_end CHECK (completed_at IS NULL)")
        with pytest.raises(StoreError, match="no_end"):
            await one(ctx)
        alter("DROP CONSTRAINT no_end")
        assert await one(ctx) == 1
        assert (await store.get_run(ctx.id())).value() == 1

    asyncio.run(scenario())


def test_a_key_is_given_to_one_run_only(store: Store) -> None:
    async def scenario() -> tuple[int, int]:
        admin = pgqrs.admin(store)
        first = await admin.create_workflow("order", 7, workflow_key="order-7")
        return first.id(), (await admin.create_workflow("order", 7, workflow_key="order-7")).id()

    first, second = asyncio.run(scenario())
    assert first == second


def test_what_is_misused_says_how_it_is_used(store: Store, database_dsn: str) -> None:
    @workflow
    async def flow(ctx: PyWorkflow) -> None: ...

    with pytest.raises(StepMisused, match="context of a run first"):
        flow("https://example.org")
    with pytest.raises(StepMisused, match="name="):
        workflow("flow")
    with pytest.raises(RunNotFound, match="4711"):
        asyncio.run(pgqrs.admin(store).get_workflow(4711))
    with pytest.raises(StoreUnavailable):
        asyncio.run(pgqrs_celery.connect("postgresql://127.0.0.1:1/nowhere"))


def test_the_monitoring_queries_answer_in_psql(own_database_dsn: str) -> None:
    @step
    async def good(ctx: PyWorkflow) -> int:
        return 1

    @step
    async def bad(ctx: PyWorkflow) -> None:
        raise ValueError("bad")

    @workflow
    async def data_pipeline(ctx: PyWorkflow) -> None:
        await good(ctx)
        await bad(ctx)

    async def scenario() -> None:
        admin = Admin(own_database_dsn)
        await admin.install()
        with pytest.raises(ValueError, match="bad"):
            await data_pipeline(await admin.create_workflow("data_pipeline"))
        await (await admin.create_workflow("stuck")).acquire_step("step")

    asyncio.run(scenario())
    operations = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    queries = next(q for q in re.findall(r"```sql\n(.*?)```", operations, re.DOTALL) if "data_pipeline" in q)
    status, *steps = psql(own_database_dsn, queries)
    assert status.split("|")[:3] == ["1", "data_pipeline", "FAILED"]
    found = {fields[3]: (fields[2], fields[4], bool(fields[5])) for fields in (line.split("|") for line in steps)}
    assert found == {
        "data_pipeline()": ("FAILED", "FAILED", True),
        "good": ("FAILED", "SUCCESS", True),
        "bad": ("FAILED", "FAILED", True),
    }
    psql(own_database_dsn, "UPDATE pgqrs_workflows SET updated_at = now() - interval '2 hours'")
    assert psql(own_database_dsn, queries)[-1].split("|")[0] == "2"  # the one that is stuck


def test_the_console_script_installs_once_and_says_so(database_dsn: str, schema: str) -> None:
    def install(*options: str) -> Any:
        return CliRunner().invoke(main, ["install", *options], env={"PGQRS_CELERY_DSN": ""})

    first = install("--dsn", database_dsn, "--schema", schema)
    assert first.exit_code == 0, first.output
    assert re.search(rf"schema {schema} .*applied 0001_ledger.sql", first.output)
    with psycopg.connect(database_dsn) as connection:
        connection.execute(f"SELECT workflow_id FROM {schema}.pgqrs_workflow_steps")
    assert "up to date" in install("--dsn", database_dsn, "--schema", schema).output
    assert install().exit_code == 2
    assert "--dsn" in install().output
    refused = install("--dsn", "postgresql://127.0.0.1:1/nowhere")
    assert refused.exit_code == 1
    assert refused.output.startswith("Error: cannot connect")
    assert "CREATE TABLE" in install("--sql").output
