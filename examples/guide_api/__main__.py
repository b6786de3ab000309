"""Two ways to execute workflows without Celery: in the calling process, and in consumers that take triggered runs.

Run it with ``python -m examples.guide_api``. Expected output (the numbers vary)::

    === A process is killed in the second step of its workflow ===
    run 1
    [measure] executing
    [summarize] executing
    [summarize] SIGKILL
    the process ended with signal 9

    === Another process goes on with the run ===
    [summarize] executing
    Rome: 12 degrees

    === A run is triggered, and taken by a consumer ===
    run 2 is QUEUED
    the consumer got {'id': 1, 'payload': 'parcel'}
    run 2 is SUCCESS: {'packed': 'parcel'}

``measure`` is executed once: the second process is given its recorded result.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pgqrs_celery
from pgqrs_celery import PyWorkflow, embedded
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.decorators import step, workflow


@step
async def pack(ctx: PyWorkflow, payload: str) -> dict[str, str]:
    """Put it into a box."""
    return {"packed": payload}


@workflow(name="shipping")
async def shipping(ctx: PyWorkflow, order: dict[str, str]) -> dict[str, str]:
    """Pack what was ordered."""
    packed: dict[str, str] = await pack(ctx, order["payload"])
    return packed


def program(*arguments: str) -> str:
    """Execute the workflow in a process of its own and return what it printed."""
    command = [sys.executable, "-m", "examples.guide_api.report", *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(answer.stdout, end="")
    if answer.returncode < 0:
        print(f"the process ended with signal {-answer.returncode}")
    return answer.stdout


async def consume() -> None:
    store = await pgqrs_celery.connect(os.environ[DSN_VARIABLE])
    await store.create_workflow("shipping")
    consumer = await pgqrs_celery.consumer("packer", 9501, "shipping").create(store)

    run_id = await pgqrs_celery.workflow("shipping").trigger({"id": 1, "payload": "parcel"}).execute(store)
    print(f"run {run_id} is {(await store.get_run(run_id)).status}")

    [message] = await consumer.dequeue(batch_size=1)
    print(f"the consumer got {message.payload}")
    run = await pgqrs_celery.run().message(message).store(store).execute()
    await shipping(run, message.payload)
    await consumer.archive(message.id)

    found = await pgqrs_celery.workflow("shipping").get_run(run_id, store)
    print(f"run {run_id} is {found.status}: {found.output}")


def main() -> None:
    if not os.environ.get(DSN_VARIABLE):
        os.environ[DSN_VARIABLE] = embedded.dsn()
    print("=== A process is killed in the second step of its workflow ===", flush=True)
    run = program().split()[1]
    print("\n=== Another process goes on with the run ===")
    program(run)
    print("\n=== A run is triggered, and taken by a consumer ===")
    asyncio.run(consume())


if __name__ == "__main__":
    main()
