"""A workflow that the calling process executes: one run, in as many processes as it takes.

``python -m examples.guide_api.report`` begins a run and kills itself in the second step; with the run's id as its
argument it goes on with that run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import pgqrs_celery
from pgqrs_celery import PyWorkflow
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.decorators import step, workflow


@step
async def measure(ctx: PyWorkflow, city: str) -> dict[str, Any]:
    """Ask the stations."""
    print("[measure] executing", flush=True)
    return {"city": city, "degrees": [11, 14, 12, 11]}


@step
async def summarize(ctx: PyWorkflow, measured: dict[str, Any]) -> float:
    """Compute the mean; the first process does not survive it."""
    print("[summarize] executing", flush=True)
    if len(sys.argv) == 1:
        print("[summarize] SIGKILL", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    degrees = measured["degrees"]
    return sum(degrees) / len(degrees)


@workflow
async def report(ctx: PyWorkflow, city: str) -> str:
    """Measure, then summarize."""
    measured = await measure(ctx, city)
    return f"{city}: {await summarize(ctx, measured):g} degrees"


async def main() -> None:
    store = await pgqrs_celery.connect(os.environ[DSN_VARIABLE])
    admin = pgqrs_celery.admin(store)
    await admin.install()
    if len(sys.argv) == 1:
        ctx = await admin.create_workflow("report", "Rome")
        print(f"run {ctx.id()}", flush=True)
    else:
        ctx = await admin.get_workflow(int(sys.argv[1]))
    print(await report(ctx, "Rome"))


if __name__ == "__main__":
    asyncio.run(main())
