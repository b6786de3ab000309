"""The tasks the acceptance tests are written in."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import chain

from pgqrs_celery import DurableTask, Pgqrs
from tests.support.effects import EffectLog
from tests.support.points import Points

__all__ = ["Vocabulary", "named"]

Define = Callable[..., Callable[[Callable[..., Any]], Any]]
Begin = Callable[[Any], None]


def named(signature: Any) -> Any:
    """Return the signature with a task id that is known beforehand."""
    return signature.set(task_id=str(uuid.uuid4()))


class Vocabulary:
    """Durable tasks that note what they do before they do anything else."""

    def __init__(self, pgqrs: Pgqrs, base: type[DurableTask], log: EffectLog, points: Points) -> None:
        define = partial(pgqrs.task, base=base, bind=True, shared=False)

        def begin(running: Any) -> None:
            log.add("body", running.request.id, running.name, str(running.request.retries))
            points.reach("in_body", running.request.id)

        self._steps(define, begin)
        self._failures(define, begin, log)

        @define(name="replacer")
        def replacer(self: Any, value: list[str], links: list[Any]) -> None:
            """Let a chain take this task's place."""
            begin(self)
            raise self.replace(chain(*(self.app.signature(link) for link in links)))

        self.replacer = replacer

    def _steps(self, define: Define, begin: Begin) -> None:
        @define(name="step")
        def step(self: Any, value: list[str], label: str) -> list[str]:
            begin(self)
            return [*value, label]

        @define(name="late", acks_late=True, reject_on_worker_lost=True)
        def late(self: Any, value: list[str], label: str) -> list[str]:
            begin(self)
            return [*value, label]

        @define(name="slowly", rate_limit="60/m")
        def slowly(self: Any) -> None:
            begin(self)

        @define(name="limited", time_limit=5.0)
        def limited(self: Any, *args: Any) -> None:
            begin(self)

        @define(name="note")
        def note(self: Any, *args: Any) -> None:
            """Take note of being called, as a callback or errback."""
            begin(self)

        @define(name="ship")
        def ship(self: Any) -> None:
            """Take no arguments, which Celery finds out when the task is sent."""
            begin(self)

        @define(name="ship_untyped", typing=False)
        def ship_untyped(self: Any) -> None:
            """Take no arguments, which nobody finds out before the task is called."""
            begin(self)

        @define(name="show")
        def show(self: Any, *args: Any) -> dict[str, Any]:
            """Return what it knows about its own request."""
            begin(self)
            request, route = self.request, self.request.delivery_info
            names = ("id", "parent_id", "root_id", "correlation_id", "retries", "hostname")
            return {
                **{name: getattr(request, name) for name in names},
                "announced": request.get("announced"),
                "redelivered": route["redelivered"],
                "routing_key": route["routing_key"],
            }

        self.show = show
        self.step, self.late, self.slowly, self.limited, self.note = step, late, slowly, limited, note
        self.ship, self.ship_untyped = ship, ship_untyped

    def _failures(self, define: Define, begin: Begin, log: EffectLog) -> None:
        @define(name="fail")
        def fail(self: Any, *args: Any) -> None:
            begin(self)
            raise ValueError("as the test asked for")

        @define(name="fickle", max_retries=None)
        def fickle(self: Any, value: list[str], label: str, *, first: str, countdown: float = 0.1) -> list[str]:
            """Fail, be retried or succeed when executed for the first time; succeed ever after."""
            again = log.count(self.request.id) > 0
            begin(self)
            if not again and first == "fail":
                raise ValueError("the first execution fails")
            if not again and first == "retry":
                raise self.retry(countdown=countdown)
            return [*value, label]

        @define(name="deadly")
        def deadly(self: Any, *args: Any) -> None:
            """Kill the process that executes it, every time."""
            begin(self)
            os.kill(os.getpid(), signal.SIGKILL)

        @define(name="quit")
        def quit_(self: Any, value: list[str], label: str) -> list[str]:
            """End the process that executes it, the first time."""
            again = log.count(self.request.id) > 0
            begin(self)
            if not again:
                raise SystemExit(1)
            return [*value, label]

        class Deadly(DurableTask):
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                log.add("body", self.request.id, self.name)
                os.kill(os.getpid(), signal.SIGKILL)

        @define(name="deadly_before_acquire", base=Deadly)
        def deadly_before_acquire(self: Any, *args: Any) -> None:
            """Kill the process that is handed it, every time, before it asks for the step."""

        self.quit = quit_
        self.fail, self.fickle, self.deadly, self.deadly_before_acquire = fail, fickle, deadly, deadly_before_acquire
