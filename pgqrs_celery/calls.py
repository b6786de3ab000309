"""Calls: one step being executed, and the low-level guard of one that its caller executes himself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from pgqrs_celery import lending
from pgqrs_celery.exceptions import StepFailed
from pgqrs_celery.failures import as_replayed
from pgqrs_celery.journal import Journal, executing
from pgqrs_celery.lending import Work
from pgqrs_celery.store.inner import Inner

__all__ = ["AcquiredStep", "Attempt", "Call", "InnerGuard"]


class Call(NamedTuple):
    """A named call; ``args`` and ``kwargs`` are what the function is called with.

    One is made at every step: a tuple, as that takes a third of the time.
    """

    name: str
    function: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    #: Whether the function also gets the context, before its arguments.
    takes_context: bool = False
    compensate: Callable[..., Any] | None = None
    transactional: bool = False

    def given(self, context: object) -> Call:
        """Return the call with the context in place."""
        return self._replace(function=partial(self.function, context)) if self.takes_context else self


class Attempt:
    """One execution of a step: ``prepare``, the body inside ``with``, ``succeed`` or ``fail``, and ``end``."""

    __slots__ = ("_began", "_hash", "_journal", "_token", "_work", "call", "step_id")

    def __init__(self, journal: Journal, call: Call, step_id: str) -> None:
        self._journal = journal
        self.call = call
        self.step_id = step_id
        self._hash = journal.digest(call.args, call.kwargs)
        self._began = 0.0
        self._work: Work | None = None

    def recall(self) -> Inner | None:
        """Return the recorded success, None where the body is to be executed; may raise the recorded error."""
        return self._journal.recall(self.step_id, self._hash)

    @property
    def is_ready(self) -> bool:
        """Whether ``prepare`` has nothing to ask the database."""
        if self.call.compensate is not None and self._journal.must_note_undo:
            return False
        return not self.call.transactional and self._journal.is_confirmed and not self._journal.bodies.is_parking

    def prepare(self) -> None:
        """Make sure that the function is still ours, and begin the step's transaction if it has one."""
        self._journal.confirm()
        if self.call.compensate is not None:
            self._journal.note_undo()
        if self.call.transactional:
            self._work = lending.begin(self._journal.ledger.database)
        self._journal.bodies.begin(self.step_id)
        self._began = time.monotonic()

    def __enter__(self) -> None:
        self._journal.check()  # a wait beside this step may have parked the function while this was prepared
        self._token = executing.set((self._journal, self.step_id))
        if self._work is not None:
            self._work.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._work is not None:
            self._work.__exit__(*raised)
        executing.reset(self._token)

    def succeed(self, value: Any) -> Any:
        """Commit the result, in the step's own transaction if it has one; returns it as a replay would see it."""
        elapsed = time.monotonic() - self._began
        journal, step_id, input_hash = self._journal, self.step_id, self._hash
        if self._work is None:
            value = journal.succeed(step_id, value, name=self.call.name, input_hash=input_hash, elapsed=elapsed)
        else:
            work, self._work = self._work, None
            value = work.commit(
                lambda session: journal.succeed(step_id, value, input_hash=input_hash, elapsed=elapsed, session=session)
            )
        return value

    def fail(self, error: BaseException) -> Any:
        """Commit the error and raise it again.

        Returns the step's value instead where its success was committed after all: the answer of the commit was lost.
        """
        if self._work is not None:
            self._work.roll_back()
        if not isinstance(error, Exception) or self._journal.ended is not None:
            raise error
        elapsed = time.monotonic() - self._began
        found = self._journal.fail(self.step_id, error, input_hash=self._hash, elapsed=elapsed)
        if found is None:
            seen = as_replayed(error)
            raise seen from (error if seen is not error else error.__cause__)
        return self._journal.value(found)

    def end(self) -> None:
        """The step ends with what was recorded: from now on the function may be parked, as far as the step goes."""
        self._journal.bodies.end(self.step_id)


class Driver(Protocol):
    """Runs something that touches the database: at once, or in a thread, returning an awaitable."""

    def __call__(self, work: Callable[[], Any], /) -> Any:
        """Return what the work returns, or an awaitable of it."""


class InnerGuard:
    """The right to execute one step of a function; awaited in an ``async def`` function."""

    __slots__ = ("_began", "_drive", "_journal", "step_id")

    def __init__(self, journal: Journal, step_id: str, drive: Driver) -> None:
        self.step_id = step_id
        self._journal = journal
        self._drive = drive
        self._began = time.monotonic()

    def success(self, value: Any = None) -> Any:
        """Commit the step's result and return it as a replay would see it.

        Raises ``LeaseLost`` where another owner has the function.
        """
        elapsed = time.monotonic() - self._began
        return self._drive(lambda: self._journal.succeed(self.step_id, value, elapsed=elapsed))

    def fail(self, error: BaseException | str) -> Any:
        """Commit the step's error; it is executed again when it is asked for again."""
        failure = error if isinstance(error, BaseException) else StepFailed(error)
        elapsed = time.monotonic() - self._began

        def write() -> None:
            self._journal.fail(self.step_id, failure, elapsed=elapsed)

        return self._drive(write)


@dataclass(frozen=True, slots=True)
class AcquiredStep:
    """The answer to ``acquire_step``: EXECUTE comes with a guard, SKIPPED with the recorded value."""

    status: Literal["EXECUTE", "SKIPPED"]
    value: Any = None
    _guard: InnerGuard | None = None

    @property
    def guard(self) -> InnerGuard:
        """The guard; raises ``StepFailed`` where the step is SKIPPED and there is nothing to guard."""
        if self._guard is None:
            raise StepFailed("a skipped step has no guard: it has succeeded before, and its result is `value`")
        return self._guard
