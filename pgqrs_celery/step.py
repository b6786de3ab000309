"""``@step``: a function that is called once per run, wherever it is called from.

The first argument is the workflow's context; the rest is the step's input, a hash of which is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pgqrs_celery import lending
from pgqrs_celery.calls import Call
from pgqrs_celery.context import Context
from pgqrs_celery.exceptions import StepMisused

__all__ = ["Step", "StepCall", "step"]


class Step:
    """A function wrapped by ``@step``; ``s(...)`` makes a call of it for ``ctx.gather`` and ``ctx.start``."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        step_id: str | None = None,
        compensate: Callable[..., Any] | None = None,
        transactional: bool = False,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        #: The name its step ids begin with.
        self.name = step_id or function.__name__
        self.compensate = compensate
        self.transactional = transactional
        if transactional:
            lending.prepare()
        #: The Celery task that executes calls of this step elsewhere; None where no app is known.
        self.task: Any = None

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def __call__(self, ctx: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Execute the step, or return its recorded result."""
        if not isinstance(ctx, Context):
            raise StepMisused(
                f"step {self.name!r} must be called with the workflow's context first, not with {type(ctx).__name__}"
            )
        function = partial(self.function, ctx)
        return ctx.perform(Call(self.name, function, args, kwargs, False, self.compensate, self.transactional))

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Return a call of this step that still lacks the context."""
        return Call(self.name, self.function, args, kwargs, True, self.compensate, self.transactional)

    def s(self, *args: Any, **kwargs: Any) -> StepCall:
        """Return a call with these arguments, the context left out."""
        return StepCall(self, args, kwargs)


@dataclass(frozen=True, slots=True)
class StepCall:
    """A call of a step that is made elsewhere, or later."""

    step: Step
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def prepared(self) -> Call:
        """Return the call as it would be made here."""
        return self.step.call(self.args, self.kwargs)


def step(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a step; bare, or with ``step_id``, ``compensate`` and ``transactional``.

    ``compensate(ctx, value)`` undoes what the step has done. A transactional step writes on ``ctx.connection`` or
    ``ctx.session``.
    """
    if function is None:
        return lambda decorated: step(decorated, **options)
    return Step(function, **options)
