"""The builder: activities and steps in, a workflow out whose steps are a Celery chain of durable tasks."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Self

from celery import Celery, chain, current_app

from pgqrs_celery.app import Pgqrs
from pgqrs_celery.compat.underway_activity import Activity, RegisteredActivity, name_of
from pgqrs_celery.compat.underway_retries import RetryPolicy
from pgqrs_celery.compat.underway_scheduler import SchedulerStep, known_workflows
from pgqrs_celery.compat.underway_step import BuiltStep
from pgqrs_celery.compat.underway_workflow import BuiltWorkflow
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.function import make_task

__all__ = ["Workflow", "WorkflowBuilder", "app_for"]

#: The app of workflows that have only a database, see ``pool()``; also their namespace in the ledger.
APP: Final = "underway"

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}")

_apps: dict[tuple[str, str], Pgqrs] = {}


class Workflow(BuiltWorkflow):
    """Typed steps under a name; made by ``Workflow.builder()``."""

    @staticmethod
    def builder() -> WorkflowBuilder:
        """Begin to describe a workflow."""
        return WorkflowBuilder()


def app_for(dsn: str, schema: str = "public") -> Pgqrs:
    """Return the process's app for a database: broker, result backend and ledger are that Postgres.

    A Celery worker of another process finds it under the name it is assigned to there.
    """
    found = _apps.get((dsn, schema))
    if found is None:
        url = dsn if dsn.startswith("pgqrs+") else f"pgqrs+{dsn}"
        app = Celery(APP, broker=url, backend=url, set_as_current=False)
        app.conf.update(pgqrs_schema=schema, broker_connection_retry_on_startup=True)
        found = _apps[dsn, schema] = Pgqrs(app)
    return found


class WorkflowBuilder:
    """Describes a workflow; ``build()`` registers its tasks. Build it where workers import it, too."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._pgqrs: Pgqrs | None = None
        self._policy = RetryPolicy()
        self._activities: dict[str, Activity] = {}
        self._steps: list[tuple[Callable[..., Any], str, RetryPolicy | None]] = []

    def name(self, name: str) -> Self:
        """Give the workflow its name; runs are recorded under it."""
        if not NAME.fullmatch(name):
            raise ConfigurationError(f"workflow name {name!r}: letters, digits, '.', '_' and '-', at most 200")
        self._name = name
        return self

    def app(self, app: Pgqrs | Celery) -> Self:
        """Say which Celery app executes the workflow; ``Pgqrs(app)`` must have been called for it."""
        found = app if isinstance(app, Pgqrs) else getattr(app, "pgqrs", None)
        if found is None:
            raise ConfigurationError(f"app {app!r} has no ledger: call Pgqrs(app) first")
        self._pgqrs = found
        return self

    def pool(self, dsn: str, *, schema: str = "public") -> Self:
        """Say which Postgres is ledger, broker and result backend at once: nothing else is needed."""
        self._pgqrs = app_for(dsn, schema)
        return self

    def retry(self, policy: RetryPolicy) -> Self:
        """Say how often the steps are tried that follow in the builder without a policy of their own."""
        self._policy = policy
        return self

    def activity(self, activity: Activity | type[Activity]) -> Self:
        """Register an activity: an instance, or a class that needs no arguments."""
        made = activity() if isinstance(activity, type) else activity
        name = name_of(made)
        if name in self._activities:
            raise ConfigurationError(f"activity {name!r} is registered twice; NAME must be unique in a workflow")
        self._activities[name] = made
        return self

    def step(self, function: Callable[..., Any], *, name: str | None = None, retry: RetryPolicy | None = None) -> Self:
        """Add a step: a function of the context and its input that returns ``To.next(…)`` or ``To.done()``.

        Steps are recorded under their functions' names, so a step that is inserted later does not shift the others.
        """
        given = name or re.sub(r"\W+", "", getattr(function, "__name__", "")) or "step"
        self._steps.append((function, given, retry or self._policy))
        return self

    def build(self) -> Workflow:
        """Return the workflow; raises ``ConfigurationError`` where something is missing."""
        if self._name is None:
            raise ConfigurationError("a workflow needs a name: .name(…) before .build()")
        if not self._steps:
            raise ConfigurationError(f"workflow {self._name!r} has no step")
        pgqrs = self._pgqrs or current_pgqrs(self._name)
        if self._name in known_workflows(pgqrs):
            raise ConfigurationError(f"workflow {self._name!r} was built before on app {pgqrs.app.main!r}")
        activities = {
            name: RegisteredActivity(pgqrs, self._name, activity) for name, activity in self._activities.items()
        }
        steps = self._built(activities)
        tasks = [make_task(pgqrs, step.body(), {"name": f"{self._name}.{step.name}"}) for step in steps]
        links = [task.s() for task in tasks]
        canvas = links[0] if len(links) == 1 else chain(*links)
        workflow = Workflow(pgqrs, self._name, canvas, steps[0].input)
        known_workflows(pgqrs)[self._name] = workflow
        pgqrs.app.steps["worker"].add(SchedulerStep)
        return workflow

    def _built(self, activities: dict[str, RegisteredActivity]) -> list[BuiltStep]:
        assert self._name is not None
        seen: Counter[str] = Counter()
        steps: list[BuiltStep] = []
        for function, given, policy in self._steps:
            if not callable(function) or inspect.isclass(function):
                raise ConfigurationError(f"step {given!r} of workflow {self._name!r} is {function!r}, not a function")
            seen[given] += 1
            name = given if seen[given] == 1 else f"{given}-{seen[given]}"
            if name in activities:
                raise ConfigurationError(f"workflow {self._name!r}: {name!r} is the name of a step and of an activity")
            steps.append(BuiltStep(function, name, self._name, activities, policy or self._policy))
        for step, following in itertools.pairwise(steps):
            step.following = following
        return steps


def current_pgqrs(workflow: str) -> Pgqrs:
    """Return the ledger of Celery's current app; raises ``ConfigurationError`` where it has none."""
    found = getattr(current_app, "pgqrs", None)
    if not isinstance(found, Pgqrs):
        raise ConfigurationError(
            f"workflow {workflow!r}: say where it is executed before .build(), with .app(Pgqrs(app)) or "
            ".pool('postgresql://…')"
        )
    return found
