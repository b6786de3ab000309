"""Compensation: what has been done is undone, in reverse order, when the function fails for good.

That a step is undone is recorded in its own row: a replay of the failed attempt still skips the step, and does not
undo it twice; the next attempt (after ``resume()``) executes it again. A step that was sent as a task of its own has
its place where it was sent; it is undone if its task succeeds, which is waited for.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pgqrs_celery.journal import Journal
from pgqrs_celery.states import Status
from pgqrs_celery.store.inner import Child
from pgqrs_celery.waits import Pending, Waiting, ended

__all__ = ["Saga"]

logger = logging.getLogger(__name__)


class Executing(Protocol):
    """The context that compensations are called with."""

    @property
    def journal(self) -> Journal:
        """What is recorded of this execution."""

    def drive(self, waiting: Waiting) -> Any:
        """Drive a wait to its end; awaitable in an ``async def`` function."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that can be undone if it has succeeded."""

    step_id: str
    compensate: Callable[..., Any]
    value: Any
    #: The task by which the step was sent; how that ended, and its value, is looked up when it is to be undone.
    sent: Pending | None = None


class Saga:
    """The steps of one execution that can be undone, in the order in which they succeeded or were sent."""

    def __init__(self) -> None:
        self._done: list[Done] = []

    def __len__(self) -> int:
        return len(self._done)

    def note(self, step_id: str, compensate: Callable[..., Any] | None, value: Any, *, undone: bool = False) -> None:
        """Note that a step has succeeded."""
        if compensate is not None and not undone:
            self._done.append(Done(step_id, compensate, value))

    def note_sent(self, sent: Pending, compensate: Callable[..., Any] | None) -> None:
        """Note that a step is sent as a task of its own."""
        if compensate is not None:
            self._done.append(Done(sent.step_id, compensate, None, sent))

    def _taken(self) -> tuple[list[Done], list[Pending]]:
        """Return what may have to be undone, the last first, and those whose end has to be waited for."""
        done, self._done = self._done[::-1], []
        return done, [one.sent for one in done if one.sent is not None]

    def undo(self, context: Executing, error: BaseException) -> None:
        """Undo everything; what cannot be undone is noted on the error, and the others go on."""
        journal = context.journal
        done, sent = self._taken()
        children: Mapping[str, Child] = context.drive(ended(journal, "undo", sent)) if sent else {}
        for one in _succeeded(journal, done, children):
            with journal.inside(f"{one.step_id}/undo"):
                try:
                    journal.confirm()
                    one.compensate(context, one.value)
                    journal.undo(one.step_id)
                except Exception as failure:  # noqa: BLE001 - the error that counts is the function's
                    _note(error, one, failure)

    async def undo_async(self, context: Executing, error: BaseException) -> None:
        """Undo everything, in an ``async def`` function."""
        journal = context.journal
        done, sent = self._taken()
        children: Mapping[str, Child] = await context.drive(ended(journal, "undo", sent)) if sent else {}
        for one in _succeeded(journal, done, children):
            with journal.inside(f"{one.step_id}/undo"):
                try:
                    await asyncio.to_thread(journal.confirm)
                    undone = one.compensate(context, one.value)
                    if inspect.isawaitable(undone):
                        await undone
                    await asyncio.to_thread(journal.undo, one.step_id)
                except Exception as failure:  # noqa: BLE001 - the error that counts is the function's
                    _note(error, one, failure)


def _succeeded(journal: Journal, done: Sequence[Done], children: Mapping[str, Child]) -> Iterator[Done]:
    """Leave out the steps that were sent and did not succeed, or are undone; give the others their values."""
    for one in done:
        child = children.get(one.sent.key) if one.sent is not None else None
        if one.sent is None:
            yield one
        elif child is not None and child.status == Status.SUCCESS:
            yield replace(one, value=journal.ledger.values.load(child.output))


def _note(error: BaseException, done: Done, failure: Exception) -> None:
    logger.error("step %r cannot be undone: %r", done.step_id, failure, exc_info=failure)
    error.add_note(f"step {done.step_id!r} could not be undone: {failure!r}")
