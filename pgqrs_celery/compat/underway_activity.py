"""Activities: side effects of steps, each a durable Celery task of its own.

What an activity returned is recorded; a step that is executed again is given the record. An activity that was
interrupted is executed again: outside effects are at-least-once, make them idempotent by ``activity_id()``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from celery import current_task

from pgqrs_celery import ids
from pgqrs_celery.compat.underway_errors import FatalActivityError
from pgqrs_celery.compat.underway_retries import RetryPolicy
from pgqrs_celery.compat.underway_types import Typed
from pgqrs_celery.exceptions import ConfigurationError, StepMisused
from pgqrs_celery.function import settled

__all__ = ["Activity", "RegisteredActivity", "activity_id"]


class Activity:
    """A side effect; subclasses give it a ``NAME``, an ``Input``, an ``Output`` and ``execute``.

    ``NAME`` is recorded: it stays the same when the class is renamed. ``RETRY`` says how often it is tried, ``OPTIONS``
    are options of its Celery task (``queue``, ``time_limit`` …).
    """

    NAME: ClassVar[str]
    Input: ClassVar[Any] = Any
    Output: ClassVar[Any] = Any
    RETRY: ClassVar[RetryPolicy] = RetryPolicy()
    OPTIONS: ClassVar[dict[str, Any]] = {}

    def execute(self, value: Any) -> Any:
        """Do it and return the output; may be ``async def``."""
        raise NotImplementedError(f"{type(self).__name__} has no execute()")


def activity_id() -> str:
    """Return what identifies the call that is being executed: the same in every attempt, another one for every call."""
    if not current_task or current_task.request.id is None:
        raise StepMisused("activity_id() is for the execute() of an activity")
    return str(current_task.request.id)


class RegisteredActivity:
    """An activity of one workflow, and the Celery task that executes it."""

    def __init__(self, pgqrs: Any, workflow: str, activity: Activity) -> None:
        self.activity = activity
        self.name = name_of(activity)
        self.input = Typed(activity.Input, f"activity {self.name!r}")
        self.output = Typed(activity.Output, f"the output of activity {self.name!r}")
        options = {"bind": True, "shared": False, "name": f"{workflow}.{self.name}", **activity.OPTIONS}
        self.task = pgqrs.task(**options)(self._body())

    def _body(self) -> Any:
        # The task keeps what it is given as its run(); a bound method could not be bound again.
        def execute(task: Any, plain: Any, digest: str) -> Any:
            return self._execute(task, plain, digest)

        return execute

    def _execute(self, task: Any, plain: Any, digest: str) -> Any:
        try:
            value = settled(self.activity.execute(self.input.load(plain)))
            return {"activity": self.name, "input": digest, "output": self.output.dump(value)}
        except FatalActivityError:
            raise
        except Exception as error:  # noqa: BLE001 - tried again, and raised in the end
            self.activity.RETRY.again(task, error)

    def signature(self, value: Any) -> tuple[Any, str]:
        """Return a call's signature, and the digest of its input; raises ``InvalidInput``."""
        plain = self.input.dump(value)
        digest = ids.digest([plain])
        return self.task.s(plain, digest), digest

    def loaded(self, recorded: Any, key: str, digest: str) -> Any:
        """Return a call's output; raises ``StepMisused`` where it is that of another call."""
        if recorded["activity"] != self.name or recorded["input"] != digest:
            raise StepMisused(
                f"the call {key!r} is recorded as one of activity {recorded['activity']!r} with another input: a step "
                "must make the same calls whenever it is executed again"
            )
        return self.output.load(recorded["output"])


def name_of(activity: Any) -> str:
    """Return an activity's name; raises ``ConfigurationError`` where it has none."""
    name = getattr(activity, "NAME", None)
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"activity {activity!r} has no NAME")
    return name
