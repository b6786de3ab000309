"""The Celery app of the benchmarks, plain or durable; a worker finds in its environment which side it is on."""

from __future__ import annotations

import cProfile
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from celery import Celery, signals

from examples.support import Journal
from pgqrs_celery import Context, Pgqrs, step

__all__ = ["PROFILE", "Side", "make_app"]

NAME: Final = __name__
PREFIX: Final = "BENCH_"

#: Names a directory: every pool process of a worker writes its cProfile there when it ends.
PROFILE: Final = "BENCH_PROFILE"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things compared: where its messages and results go, and where its ledger is (plain: nowhere)."""

    name: str
    title: str
    broker: str
    backend: str
    dsn: str = ""
    schema: str = "public"
    #: Anything, or nothing for "no".
    synchronous_commit: str = "yes"
    #: Seconds, as text; nothing for the default.
    local_continuation: str = ""

    @property
    def durable(self) -> bool:
        """Whether its tasks are durable."""
        return bool(self.dsn)

    def environment(self) -> dict[str, str]:
        """Return what a worker of this side is told."""
        return {PREFIX + name.upper(): getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_environment(cls) -> Self:
        """Return the side this worker is on."""
        return cls(**{name: os.environ[PREFIX + name.upper()] for name in cls.__slots__})


def increment(number: int) -> int:
    """A step that costs nothing: what is measured is everything around it."""
    return number + 1


def hold(flag: str) -> int:
    """Note that it has begun, and wait for a file."""
    Journal.of_environment().write("hold")
    while not Path(flag).exists():
        time.sleep(0.02)
    return 0


@step
def plus_one(ctx: Context, number: int) -> int:
    """A step of a function that costs nothing."""
    return number + 1


def count_up(ctx: Context, steps: int) -> int:
    """A function of so many steps."""
    number = 0
    for _ in range(steps):
        number = plus_one(ctx, number)
    return number


async def count_up_async(ctx: Context, steps: int) -> int:
    """The same, as a coroutine."""
    number = 0
    for _ in range(steps):
        number = await plus_one(ctx, number)
    return number


def make_app(side: Side) -> Celery:
    """Return the app of one side, with the tasks ``increment`` and ``hold``; a durable one also with functions."""
    app = Celery(NAME, broker=side.broker, backend=side.backend, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True)
    if side.broker.startswith("pgmq"):
        app.conf.update(broker_transport_options={"init_extension": False})  # its tables were made by a script
    decorate: Any = app.task
    if side.durable:
        app.conf.update(
            pgqrs_dsn=side.dsn,
            pgqrs_schema=side.schema,
            pgqrs_synchronous_commit=bool(side.synchronous_commit),
        )
        if side.local_continuation:
            app.conf.pgqrs_local_continuation = float(side.local_continuation)
        pgqrs = Pgqrs(app)
        decorate = pgqrs.task
        owner: Any = app
        owner.count_up = pgqrs.workflow(name="count_up")(count_up)
        owner.count_up_async = pgqrs.workflow(name="count_up_async")(count_up_async)
    decorate(increment, name="increment")
    decorate(hold, name="hold")
    return app


@signals.worker_process_init.connect
def profile(**_: Any) -> None:
    """Profile this process of the pool, if the environment says so, until it ends."""
    directory = os.environ.get(PROFILE)
    if not directory:
        return
    profiler = cProfile.Profile()

    def dump(**_: Any) -> None:
        profiler.disable()
        profiler.dump_stats(Path(directory, f"{os.getpid()}.prof"))

    signals.worker_process_shutdown.connect(dump, weak=False)
    profiler.enable()


if PREFIX + "NAME" in os.environ:
    app = make_app(Side.of_environment())
