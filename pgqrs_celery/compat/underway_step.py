"""Steps: functions of a context and an input that return a transition, each a link of a Celery chain.

What travels from link to link is ``{"next": value}``, with a delay where one was asked for, or ``{"done": value}``.
After ``To.done()`` the remaining links pass it on: a worker that dies after the step's commit repeats the hand-off
without executing the step, so the end must be in the value, not in what was sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from celery import current_task
from celery.exceptions import Retry

from pgqrs_celery.compat.underway_activity import Activity, RegisteredActivity, name_of
from pgqrs_celery.compat.underway_errors import ActivityError, FatalTaskError
from pgqrs_celery.compat.underway_retries import RetryPolicy
from pgqrs_celery.compat.underway_types import Typed, input_of
from pgqrs_celery.context import Context
from pgqrs_celery.exceptions import InvalidInput, StepMisused

__all__ = ["BuiltStep", "StepContext", "To"]

#: Errors that trying again does not help against.
FINAL = (FatalTaskError, ActivityError, InvalidInput, StepMisused)


@dataclass(frozen=True, slots=True)
class To:
    """What a step returns: where the workflow goes from there."""

    value: Any = None
    has_next: bool = True
    #: Seconds.
    delay: float = 0.0

    @staticmethod
    def next(value: Any, *, delay: float | timedelta = 0.0) -> To:
        """Go on with the next step, whose input is ``value``; ``delay`` is in seconds and holds no worker slot."""
        return To(value, True, delay.total_seconds() if isinstance(delay, timedelta) else float(delay))

    @staticmethod
    def done(value: Any = None) -> To:
        """End the workflow here, also before its last step; the value is the run's result."""
        return To(value, False)


class StepContext:
    """What a step gets first; in an ``async def`` step, ``call`` is awaited."""

    def __init__(self, context: Context, workflow: str, activities: Mapping[str, RegisteredActivity]) -> None:
        #: The engine's context: ``sleep``, ``wait_for_event``, ``start_child`` …
        self.context = context
        self.workflow = workflow
        self._activities = activities
        self._keys: set[str] = set()
        self._emitted: list[tuple[str, Any]] = []

    @property
    def id(self) -> int:
        """The run's id."""
        return self.context.id

    def call(self, activity: type[Activity], key: str, value: Any) -> Any:
        """Execute an activity and return its output; the step is suspended meanwhile and executed again afterwards.

        The key names the call within the step. Raises ``ActivityError`` (or what else the activity raised) when it
        is not tried any more, ``InvalidInput``, and ``StepMisused`` for an activity that is not registered.
        """
        registered = self._registered(activity, key)
        signature, digest = registered.signature(value)
        if self.context.is_async:
            return self._call_async(registered, key, signature, digest)
        pending = self.context.start(signature, step_id=key)
        return registered.loaded(self.context.wait(pending), key, digest)

    async def _call_async(self, registered: RegisteredActivity, key: str, signature: Any, digest: str) -> Any:
        pending = await self.context.start(signature, step_id=key)
        return registered.loaded(await self.context.wait(pending), key, digest)

    def emit(self, activity: type[Activity], key: str, value: Any) -> Any:
        """Have an activity executed when the step has come to its end; nobody waits for it, its failure ends nothing.

        A step that fails, or is suspended, has not emitted anything (yet).
        """
        registered = self._registered(activity, key)
        self._emitted.append((key, registered.signature(value)[0]))
        return nothing() if self.context.is_async else None

    def _registered(self, activity: type[Activity], key: str) -> RegisteredActivity:
        name = name_of(activity)
        registered = self._activities.get(name)
        if registered is None:
            known = ", ".join(map(repr, self._activities)) or "none"
            raise StepMisused(
                f"activity {name!r} is not registered with workflow {self.workflow!r} (registered: {known}); "
                "add .activity(…) to its builder"
            )
        if key in self._keys:
            raise StepMisused(f"the key {key!r} names two calls of one step; in a loop, put what varies into the key")
        self._keys.add(key)
        return registered

    def send_emitted(self) -> None:
        """Send what was emitted: once, whatever is executed again."""
        for key, signature in self._emitted:
            self.context.start(signature, step_id=key)

    async def send_emitted_async(self) -> None:
        """Do the same in an ``async def`` step."""
        for key, signature in self._emitted:
            await self.context.start(signature, step_id=key)


async def nothing() -> None:
    """What an emit in an ``async def`` step may await."""


class BuiltStep:
    """One step of a workflow, and the Celery task that executes it."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        workflow: str,
        activities: Mapping[str, RegisteredActivity],
        policy: RetryPolicy,
    ) -> None:
        self.function = function
        self.name = name
        self.workflow = workflow
        self.activities = activities
        self.policy = policy
        what = f"step {name!r} of workflow {workflow!r}"
        self.input = Typed(input_of(function, what), what)
        self.following: BuiltStep | None = None

    def body(self) -> Callable[..., Any]:
        """Return the function that the step's Celery task executes with the engine's context."""

        def run(ctx: Context, state: dict[str, Any]) -> Any:
            if "done" in state:
                return state
            if state.get("delay"):
                ctx.sleep("delay", seconds=state["delay"])
            cx = StepContext(ctx, self.workflow, self.activities)
            try:
                state = self._state(self.function(cx, self.input.load(state["next"])))
                cx.send_emitted()
            except Exception as error:  # noqa: BLE001 - tried again, or raised
                self._failed(error)
            return state

        async def run_async(ctx: Context, state: dict[str, Any]) -> Any:
            if "done" in state:
                return state
            if state.get("delay"):
                await ctx.sleep("delay", seconds=state["delay"])
            cx = StepContext(ctx, self.workflow, self.activities)
            try:
                state = self._state(await self.function(cx, self.input.load(state["next"])))
                await cx.send_emitted_async()
            except Exception as error:  # noqa: BLE001 - tried again, or raised
                self._failed(error)
            return state

        chosen: Callable[..., Any] = run_async if inspect.iscoroutinefunction(self.function) else run
        chosen.__name__ = chosen.__qualname__ = self.name
        chosen.__module__ = self.function.__module__
        return chosen

    def _failed(self, error: Exception) -> None:
        if isinstance(error, (Retry, *FINAL)):
            raise error
        self.policy.again(current_task, error)

    def _state(self, transition: Any) -> dict[str, Any]:
        """Return what the next link is given; raises ``StepMisused`` and ``InvalidInput``."""
        if not isinstance(transition, To):
            raise StepMisused(f"step {self.name!r} returned {transition!r}; it must return To.next(…) or To.done()")
        if not transition.has_next:
            return {"done": transition.value}
        if self.following is None:
            raise StepMisused(f"step {self.name!r} is the last of {self.workflow!r}; it must return To.done()")
        state = {"next": self.following.input.dump(transition.value)}
        return {**state, "delay": transition.delay} if transition.delay > 0 else state
