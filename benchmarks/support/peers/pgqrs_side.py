"""pgqrs: two worker processes that dequeue, execute and archive; a client that triggers and waits.

It has one form: batches of messages, and results looked for every half second.
"""

from __future__ import annotations

import asyncio
import os

import pgqrs
from protocol import arguments, serve

QUEUE = "count_up"
BATCH = 8


async def connect(dsn: str):
    """Its driver wants a host in front of the database, also where the real one is a directory behind it."""
    return await pgqrs.connect(dsn.replace("@/", "@localhost/"))


async def work(dsn: str) -> None:
    store = await connect(dsn)
    consumer = await store.consumer(QUEUE)
    print("ready", flush=True)
    while True:
        messages = await consumer.dequeue(BATCH)
        if not messages:
            await asyncio.sleep(0.005)
            continue
        await asyncio.gather(*(handle(store, consumer, message) for message in messages))


async def handle(store, consumer, message) -> None:
    run = await pgqrs.run().message(message).store(store).execute()
    await run.start()
    number = 0
    given = message.payload
    for n in range(given["input"] if isinstance(given, dict) else given):
        step = await run.acquire_step(f"increment-{n}")
        if step.status == pgqrs.StepResultStatus.Execute:
            number = number + 1
            await step.guard.success(number)
        else:
            number = step.value
    await run.success(number)
    await consumer.archive(message.id)


async def set_up(store) -> None:
    await pgqrs.admin(store).install()
    await pgqrs.workflow().name(QUEUE).store(store).create()


def main() -> None:
    given = arguments()
    if given.role == "worker":
        asyncio.run(work(given.dsn))
        return
    loop = asyncio.new_event_loop()
    store = loop.run_until_complete(connect(given.dsn))
    if given.role == "setup":
        loop.run_until_complete(set_up(store))
        os._exit(0)  # now and then its threads abort the interpreter when that ends

    async def start(count: int, steps: int) -> None:
        triggered = [await pgqrs.workflow().name(QUEUE).store(store).trigger(steps).execute() for _ in range(count)]
        waiting = (pgqrs.run().message(message).store(store).result() for message in triggered)
        assert await asyncio.gather(*waiting) == [steps] * count

    serve(lambda count, steps: loop.run_until_complete(start(count, steps)))


main()
