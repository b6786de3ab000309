"""``@workflow`` and ``@step`` as the guides use them: on functions that are called with a context."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from pgqrs_celery import inline
from pgqrs_celery.context import Context
from pgqrs_celery.exceptions import StepMisused
from pgqrs_celery.inline import InlineContext
from pgqrs_celery.step import step

__all__ = ["InlineWorkflow", "step", "workflow"]


class InlineWorkflow:
    """A function wrapped by ``@workflow``: called with a context it executes, or resumes, the context's run."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        #: The name that its runs are created, or triggered, under.
        self.name = name or function.__name__

    def __repr__(self) -> str:
        return f"<workflow {self.name}>"

    def __call__(self, ctx: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Execute the function; awaitable where it is ``async def``.

        A run that has succeeded is not executed again: its result is returned.
        """
        if isinstance(ctx, InlineContext):
            return inline.call(self.function, ctx, args, kwargs)
        if isinstance(ctx, Context):
            return self.function(ctx, *args, **kwargs)
        raise StepMisused(
            f"workflow {self.name!r} must be called with the context of a run first, as create_workflow() returns it, "
            f"not with {type(ctx).__name__}"
        )


def workflow(function: Callable[..., Any] | None = None, /, *, name: str | None = None) -> Any:
    """Make a function a workflow; bare, or with the name its runs have."""
    if function is None:
        return lambda decorated: workflow(decorated, name=name)
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise StepMisused(f"@workflow is put on a function, not on {function!r}; a name is given as name={function!r}")
    return InlineWorkflow(function, name)
