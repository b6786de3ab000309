"""What is under way in one execution of a function, so that it is not put to sleep in the middle of it.

A function that makes several calls at once may come to a wait beside a step that is still being executed. Parked then,
it would lose the step's result, and execute it again; or it would sleep before the step has begun. So it is parked when
everything that is under way waits, and no other task of its event loop is left, or none that begins anything.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

__all__ = ["Bodies", "first_task"]

#: Seconds after which nothing more is expected of tasks in the event loop that neither wait here nor begin a step.
GRACE: Final = 1.0

#: Passes of an event loop in which the end of a task reaches the function; each ``gather`` in between takes two.
PASSES: Final = 32

#: The task that an event loop was started for; it is waiting for the others.
first_task: ContextVar[asyncio.Task[Any] | None] = ContextVar("pgqrs_first_task", default=None)


class Bodies:
    """The bodies of steps being executed, and the waits, of one execution."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._active: set[str] = set()
        #: The steps in which waits are pending, "" for the function itself.
        self._waits: Counter[str] = Counter()
        self._parking = False
        #: The tasks of the event loop that wait here, and whether there are others.
        self._waiting: set[asyncio.Task[Any] | None] = {None}
        self._alone = True
        self._last = time.monotonic()

    @property
    def is_parking(self) -> bool:
        """Whether the function is being parked at this moment."""
        return self._parking

    def settle(self) -> None:
        """Return when it is known whether the function is parked."""
        with self._lock:
            while self._parking:
                self._changed.wait()

    def begin(self, step_id: str) -> None:
        """A step's body begins; to be followed by ``check`` and ``end``."""
        with self._lock:
            while self._parking:
                self._changed.wait()
            self._active.add(step_id)
            self._last = time.monotonic()

    def end(self, step_id: str) -> None:
        """A step's outcome is recorded, or will not be, and the step is about to end with it."""
        with self._lock:
            self._active.discard(step_id)
            self._last = time.monotonic()

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """The present task of an event loop waits; before each look it says with ``look_around`` who else is there."""
        task = asyncio.current_task()
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    async def look_around(self) -> None:
        """Look whether other tasks of the event loop may begin something, or one has just ended.

        Whoever waits for that one hears of it some passes of the loop later, and may end the function.
        """
        alone = self._is_alone()
        for _ in range(PASSES):
            await asyncio.sleep(0)
        self._alone = alone and self._is_alone()

    def _is_alone(self) -> bool:
        return asyncio.all_tasks() <= self._waiting | {first_task.get()}

    @contextmanager
    def waiting(self, step_id: str | None) -> Iterator[None]:
        """A wait is pending in the body of a step, or in the function itself."""
        with self._lock:
            self._waits[step_id or ""] += 1
            self._last = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._waits[step_id or ""] -= 1
                self._waits += Counter()  # forget those that are over

    @contextmanager
    def parking(self, wanted: bool) -> Iterator[bool]:
        """Say whether the function may be parked, where that is wanted; nothing begins until that is done."""
        with self._lock:
            quiet = self._alone or time.monotonic() - self._last >= GRACE
            may = wanted and quiet and not self._parking and not self._is_busy()
            self._parking = self._parking or may
        try:
            yield may
        finally:
            if may:
                with self._lock:
                    self._parking = False
                    self._changed.notify_all()

    def _is_busy(self) -> bool:
        """Whether the body of any step does something else than to wait."""
        return any(not any(_is_in(wait, step_id) for wait in self._waits) for step_id in self._active)


def _is_in(wait: str, step_id: str) -> bool:
    return wait == step_id or wait.startswith(f"{step_id}/")
