"""The Celery app of the acceptance tests: the same in the test (as the client) and in every worker process.

Crash points are put around what any user of Celery can get at: a task class of one's own, the signals of publishing,
and the methods by which a result backend is told of an outcome. Nothing of the package under test is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final

from celery import Celery, current_task, signals
from celery.backends.base import Backend
from psycopg import sql

from pgqrs_celery import DurableTask, Pgqrs
from tests.support.asking import ask
from tests.support.effects import EffectLog
from tests.support.journeys import Journeys
from tests.support.points import Points
from tests.support.stops import Stops
from tests.support.vocabulary import Vocabulary

__all__ = ["LOCAL", "LONG_LEASE", "QUEUED", "Application", "Scenario"]

#: The environment variable by which a worker process learns of its scenario.
VARIABLE: Final = "PGQRS_TEST_SCENARIO"

#: What makes a worker quick to notice things; a lease is still long enough for a busy machine.
QUICK: Final[Mapping[str, Any]] = {
    "pgqrs_lease": 3.0,
    "pgqrs_resend_interval": 1.0,
    "pgqrs_relay_interval": 1.0,
    "pgqrs_watch_interval": 0.2,
    "worker_prefetch_multiplier": 1,
    "broker_connection_retry_on_startup": True,
}

#: Where no lease has to end: what a body has noted must not be noted once more because the process that renews its
#: lease did not get to run for a while.
LONG_LEASE: Final[Mapping[str, Any]] = {"pgqrs_lease": 30.0}


#: Processes go on with the next link themselves, as long as they can; or never. By default they do, for a second.
LOCAL: Final[Mapping[str, Any]] = {"pgqrs_local_continuation": 30.0}
QUEUED: Final[Mapping[str, Any]] = {"pgqrs_local_continuation": 0.0}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything a process needs to build the app."""

    broker: str
    backend: str
    dsn: str
    schema: str
    directory: str
    name: str = "acceptance"
    conf: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environment(cls) -> Scenario:
        """Return the scenario this process was started in."""
        return cls(**json.loads(os.environ[VARIABLE]))

    @classmethod
    def on_postgres(cls, dsn: str, schema: str, directory: str) -> Scenario:
        """Return a scenario in which broker, results and ledger are in one schema."""
        url = f"pgqrs+{dsn}{'&' if '?' in dsn else '?'}pgqrs_schema={schema}"
        return cls(url, url, dsn, schema, directory)

    @property
    def on_one_postgres(self) -> bool:
        """Whether broker, results and ledger are in one database."""
        return self.broker == self.backend == self.on_postgres(self.dsn, self.schema, self.directory).broker

    @property
    def goes_on(self) -> bool:
        """Whether processes go on with the next link themselves."""
        return self.conf.get("pgqrs_local_continuation") != 0.0

    def using(self, broker: str | None, backend: str | None) -> Scenario:
        """Return the scenario with another broker or backend, where given."""
        return replace(self, broker=broker or self.broker, backend=backend or self.backend)

    def elsewhere(self, dsn: str) -> Scenario:
        """Return the scenario with everything it has on Postgres on another server."""
        moved = self.on_postgres(dsn, self.schema, self.directory)
        own = {name: getattr(moved, name) for name in ("broker", "backend") if getattr(self, name).startswith("pgqrs")}
        return replace(self, dsn=dsn, **own)

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that is to be in this scenario."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}

    def settings(self) -> dict[str, Any]:
        """Return the configuration of an app in this scenario."""
        return {**QUICK, "pgqrs_dsn": self.dsn, "pgqrs_schema": self.schema, **self.conf}

    def with_conf(self, **conf: Any) -> Scenario:
        """Return the scenario with some settings changed."""
        return replace(self, conf={**self.conf, **conf})

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Execute a statement past the package; ``{}`` stands for the schema. Returns the rows, if there are any."""
        return ask(self.dsn, sql.SQL(statement).format(sql.Identifier(self.schema)), parameters)

    @property
    def stops(self) -> Stops:
        """Where transactions on the ledger's database can be stopped."""
        return Stops(self.dsn, self.schema)

    @property
    def log(self) -> EffectLog:
        """What the processes of this scenario did."""
        return EffectLog(Path(self.directory) / "effects.log")

    @property
    def points(self) -> Points:
        """Where the processes of this scenario can be stopped."""
        return Points(Path(self.directory))


class Application:
    """A Celery app with a ledger, the tasks of the vocabulary, and crash points around everything."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.celery = Celery(scenario.name, broker=scenario.broker, backend=scenario.backend)
        self.celery.conf.update(scenario.settings())
        self.pgqrs = Pgqrs(self.celery)
        self.tasks = Vocabulary(self.pgqrs, watched(scenario.points), scenario.log, scenario.points)
        self.functions = Journeys(self.pgqrs, scenario.log, scenario.points)

    def watch(self) -> None:
        """Note what this process sends, and let it be stopped around that and around results (worker processes)."""
        watch_publishing(self.scenario.log, self.scenario.points)
        watch_results(self.scenario.points)


def watched(points: Points) -> type[DurableTask]:
    """Return a base class for tasks whose executions can be stopped at either end."""

    class WatchedTask(DurableTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            task_id = self.request.id
            if self.request.called_directly or task_id is None:
                return super().__call__(*args, **kwargs)
            points.reach("delivered_before_acquire", task_id)
            value = super().__call__(*args, **kwargs)
            points.reach("after_body_before_commit", task_id)
            return value

        def after_return(self, status: str, retval: Any, task_id: str, *rest: Any) -> None:
            points.reach("after_hand_off_before_ack", task_id)

    return WatchedTask


def watch_publishing(log: EffectLog, points: Points) -> None:
    """Note every message this process sends.

    A relay has points of its own: where the sender stalls for as long as a relay waits, the relay sends the message
    first, and a test that is after the sender must not get hold of a relay's process.
    """
    workers: list[Any] = []
    signals.worker_init.connect(lambda sender, **_: workers.append(sender), weak=False)

    def point(of_sender: str, of_relay: str) -> str:
        return of_relay if workers and not current_task else of_sender

    @signals.before_task_publish.connect(weak=False)
    def before(headers: dict[str, Any], **_: Any) -> None:
        headers["announced"] = headers["id"]
        points.reach(point("recorded_before_publish", "claimed_before_publish"), headers["id"])

    @signals.after_task_publish.connect(weak=False)
    def after(headers: Mapping[str, Any], sender: str, **_: Any) -> None:
        log.add("sent", headers["id"], sender)
        points.reach(point("published", "relayed"), headers["id"])


def watch_results(points: Points) -> None:
    """Let this process be stopped before and after an outcome is stored."""

    def between(before: str, method: Callable[..., Any], after: str) -> Callable[..., Any]:
        @wraps(method)
        def told(self: Any, task_id: str, *args: Any, **kwargs: Any) -> Any:
            points.reach(before, task_id)
            answer = method(self, task_id, *args, **kwargs)
            points.reach(after, task_id)
            return answer

        return told

    done = between("after_next_link_before_result", Backend.mark_as_done, "after_result_before_hand_off")
    failed = between("after_fail_before_consequences", Backend.mark_as_failure, "after_consequences_before_hand_off")
    retried = between("after_retry_recorded", Backend.mark_as_retry, "after_retry_stored")
    Backend.mark_as_done = done  # type: ignore[method-assign]
    Backend.mark_as_failure = failed  # type: ignore[method-assign]
    Backend.mark_as_retry = retried  # type: ignore[method-assign]
