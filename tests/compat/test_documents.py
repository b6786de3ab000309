"""Every Python block of the implemented documents runs, and prints what its document says.

Only the import is changed (and the database's address). Skipped where the documents are not at hand; the other tests
of this directory check the same intent with programs of their own.
"""

from __future__ import annotations

import json
import textwrap

import pytest

from tests.compat import seeds
from tests.compat.conftest import Program, output, psql
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(seeds.directory() is None, reason="the documents are NOT AT HAND (PGQRS_SEEDS)")

GUIDES = ["Admin(dsn, None)", "await pgqrs.connect(dsn)"]

#: What the fragments on good practice take for granted.
SURROUNDINGS = """
import asyncio
from pgqrs_celery import PyWorkflow, admin, connect
from pgqrs_celery.decorators import step, workflow

class TransientError(Exception): ...

class email_service:
    sent = []
    @staticmethod
    async def send(**letter):
        email_service.sent.append(letter)

class external_api:
    calls = 0
    @staticmethod
    async def call(data):
        external_api.calls += 1
        if external_api.calls == 1:
            raise TransientError
        return {"answer": data}

def transform(item):
    return {**item, "transformed": True}
"""


def document(title: str, containing: str) -> str:
    found = seeds.document(title, containing=containing)
    assert found, f"{title!r} is not among the documents"
    return found


@pytest.mark.parametrize("form", GUIDES)
def test_the_pipeline_of_the_guide_prints_what_the_guide_says(
    form: str, own_database_dsn: str, program: Program
) -> None:
    text = document("Durable Workflows Guide", form)
    blocks = [seeds.ported(block, own_database_dsn) for block in seeds.python_blocks(text)]
    printed = output(program("import pgqrs_celery\n" + "\n".join(blocks[:3])))
    assert seeds.matches(printed, seeds.expected_outputs(text)[0]), printed


@pytest.mark.parametrize("form", GUIDES)
def test_the_crash_demo_of_the_guide_prints_what_the_guide_says(
    form: str, own_database_dsn: str, program: Program
) -> None:
    text = document("Durable Workflows Guide", form)
    block = seeds.ported(seeds.python_blocks(text)[3], own_database_dsn)
    printed = output(program("import pgqrs_celery\n" + block))
    assert seeds.matches(printed, seeds.expected_outputs(text)[1]), printed


@pytest.mark.parametrize("form", GUIDES)
def test_the_good_practice_of_the_guide_works(form: str, own_database_dsn: str, program: Program) -> None:
    text = document("Durable Workflows Guide", form)
    blocks = [seeds.ported(block, own_database_dsn) for block in seeds.python_blocks(text)[4:]]
    assert len(blocks) == 4
    calls = f"""
@workflow
async def practice(ctx):
    await fetch_user_profile(ctx, "u1")
    await step1(ctx, "x")
    await send_email(ctx, "u1", "welcome")
    risky = await risky_call(ctx, {{"n": 1}})
    batch = await process_batch(ctx, [{{"n": 1}}, {{"n": 2}}])
    return [risky, batch, await process_one(ctx, {{"n": 3}})]

async def run():
    store = await connect({own_database_dsn!r})
    await admin(store).install()
    ctx = await admin(store).create_workflow("practice")
    first = await practice(ctx)
    again = await practice(await admin(store).get_workflow(ctx.id()))
    import json
    print(json.dumps([first, again, email_service.sent, external_api.calls, ctx.id()]))

asyncio.run(run())
"""
    printed = output(program("\n".join([SURROUNDINGS, *blocks, calls])))
    first, again, sent, external_calls, run_id = json.loads(printed)
    assert first == again
    assert first[0] == {"answer": {"n": 1}}
    assert first[1]["processed"] == 2
    assert sent == [{"user_id": "u1", "template": "welcome", "idempotency_key": f"email-{run_id}-u1"}]
    assert external_calls == 2  # once in vain, once with success; not again when the run was looked at again


def test_the_blocks_of_the_api_page_do_what_the_page_says(own_database_dsn: str, program: Program) -> None:
    text = document("Workflows API", "acquire_step")
    define, start, risky, low_level = (seeds.ported(b, own_database_dsn) for b in seeds.python_blocks(text))
    calls = f"""
done = []

def do_work():
    done.append(1)
    if len(done) == 1:
        raise RuntimeError("the first time")
    return "worked"

async def low_level(ctx):
{textwrap.indent(low_level, "    ")}

async def run():
    import pgqrs_celery
    admin = pgqrs_celery.admin(await pgqrs_celery.connect({own_database_dsn!r}))
    await admin.install()
{textwrap.indent(start, "    ")}
    print(result)
    ctx = await admin.create_workflow("risky")
    try:
        await risky_step(ctx)
    except ValueError as error:
        print(error)
    ctx = await admin.create_workflow("low level")
    for _ in range(3):
        try:
            print(await low_level(ctx), len(done))
        except RuntimeError as error:
            print(error)

import asyncio
asyncio.run(run())
"""
    printed = output(program("\n".join([define, risky, calls])))
    # A step that failed is asked for anew, one that has succeeded is skipped.
    assert printed.splitlines() == ["data", "Something went wrong", "the first time", "worked 2", "worked 2"]


def test_the_trigger_and_worker_guide_runs_from_definition_to_result(own_database_dsn: str, program: Program) -> None:
    text = document("Basic Workflow Guide", "dequeue")
    setup, trigger, worker, result = (seeds.ported(b, own_database_dsn) for b in seeds.python_blocks(text))
    assert output(program(setup)).splitlines() == ["✓ Schema installed", "✓ Workflow 'process_task' defined"]
    assert output(program(setup)).splitlines()[-1] == "✓ Workflow 'process_task' defined"  # idempotent
    assert output(program(trigger)).strip() == "✓ Triggered workflow run: 1"
    assert output(program(result)).splitlines() == ["Run Status: QUEUED", "Output: None"]
    task = "async def process_task(payload):\n    print('processing', payload)\n"
    working = program(task + worker)
    assert working.stdout is not None
    assert working.stdout.readline().strip() == "Worker started. Waiting for runs..."
    assert working.stdout.readline().strip() == "processing {'id': 1, 'payload': 'Hello pgqrs'}"
    wait_for(
        lambda: output(program(result)).splitlines() == ["Run Status: SUCCESS", "Output: {'status': 'success'}"],
        60.0,
        "the run to succeed",
    )
    assert working.poll() is None


def test_the_monitoring_queries_of_the_guide_run_verbatim_and_say_what_they_promise(
    own_database_dsn: str, program: Program
) -> None:
    text = document("Durable Workflows Guide", "Admin(dsn, None)")
    blocks = [seeds.ported(block, own_database_dsn) for block in seeds.python_blocks(text)]
    output(program("\n".join(blocks[:3])))
    queries = next(match[3] for match in seeds.FENCED.finditer(text) if match[2] == "sql")
    answers = psql(own_database_dsn, queries)
    assert [line.split("|")[:3] for line in answers] == [
        ["1", "data_pipeline", "SUCCESS"],
        *(["1", "data_pipeline", "SUCCESS"] for _ in range(4)),
    ]
    steps = {line.split("|")[3]: line.split("|")[4:] for line in answers[1:]}
    assert set(steps) == {"data_pipeline()", "fetch_data", "transform_data", "save_results"}
    assert all(status == "SUCCESS" and completed for status, completed in steps.values())
    age = "UPDATE pgqrs_workflows SET status = 'RUNNING', updated_at = now() - interval '2 hours'"
    psql(own_database_dsn, age)
    assert len(psql(own_database_dsn, queries)) == len(answers) + 1
